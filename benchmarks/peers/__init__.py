"""Other tools as arms: scripts that run in environments of their own, which `make peers` builds.

A peer is a process that speaks JSON lines: one request on its standard input, one answer on its standard output.

    (start)                                            {"ready": true, "versions": {"torch": "2.13"}}
    {"do": "open", "folder": "...", "cell": {...},
     "threads": 2, "cache": "...", "scheduler": {...}} {"phases": {"export_s": 9.0, "load_s": 2.0},
                                                        "precision": "bfloat16", "placement": ["unet: ..."]}
    {"do": "run", "inputs": "..."}                     {"seconds": {"total": 1.0, "text": 0.1, "steps": [0.1, 0.1],
                                                                    "vae": 0.2, "post": 0.01}}
    {"do": "stages", "inputs": "...", "out": "..."}    {"stages": ["text", "denoiser", "vae", "picture"]}

Every answer carries `rss_mib` (peak), `pss_mib` (now), `cpu_s`, and `gpu_mib` where the peer knows it; a failure is
{"error": "one sentence"}. End of input ends the process. `precision` is what the peer reads back from what it opened,
null where it cannot tell. `inputs` is a folder with

    call.json       prompt, negative_prompt, guidance_scale, num_inference_steps, height, width, num_images_per_prompt
    latents.npy     first latents [N, c, h, w] of the picture
    denoiser.X.npy  input X (sample, encoder_hidden_states ...) of one call at timestep 500, both branches of guidance
    decode.npy      latents [N, c, h, w] as the decoder takes them
    image.png       (and mask_image.png) what a task starts from or follows, with seeds 0, 1 ...

and `stages` writes those that the peer can into `out` as text.npy
(hidden states of the prompt), denoiser.npy, vae.npy [N, C, H, W] in -1..1 and
picture.npy [N, H, W, C] in 0..1. `serve.py` does all of this but the peer's own calls.
"""
