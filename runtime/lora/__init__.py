"""Low-rank adapters (LoRA): files of every layout, what they change, and how engines take that. No PyTorch here."""
