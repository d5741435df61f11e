"""Flow-map language models in JAX: few-step text generation by interpolants, flow maps and diffusion."""

__version__ = "0.1.0"
