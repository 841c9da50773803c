"""Pipelines: pure orchestration over engines."""

from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.outputs import PipelineOutput
from anamorph.pipelines.stable_diffusion import StableDiffusionPipeline

__all__ = ["DiffusionPipeline", "PipelineOutput", "StableDiffusionPipeline"]
