"""vlm: contrastive vision-language models in JAX."""
