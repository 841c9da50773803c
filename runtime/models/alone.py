"""Models that come in folders of their own, exported or not."""

from pathlib import Path
from typing import Any

from anamorph.artifact import is_artifact
from anamorph.errors import InputError
from anamorph.models.base import Model


class Alone(Model):
    """What ControlNets and T2I-Adapters have in common."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """See `Model.from_pretrained`; an exported folder gives what pipelines take in the place of a model.

        Raises InputError: an option has no meaning for an exported folder.
        """
        from anamorph.pipelines.describing import alone

        folder = Path(pretrained_model_name_or_path).expanduser() / (options.get("subfolder") or "")
        if not is_artifact(folder):
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        if given := [name for name, value in options.items() if name != "subfolder" and value is not None]:
            raise InputError(f"{folder} is an exported folder, for which {given[0]} has no meaning; leave it out")
        return alone(folder, (cls.__name__,))
