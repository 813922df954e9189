"""Facts of a loaded model, as a notebook or terminal shows them."""

import math

from vlm.errors import brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights.rules import flat_shapes


def facts_of(model: DualEncoder, tokenizer: Tokenizer) -> dict[str, str]:
    """Return sizes, loss and prompts of a model by name."""
    c, rules = model.config, tokenizer.config
    own, patch = getattr(c.vision, "module", None), c.vision.patch_size
    layout = f"patches of {patch}" if own is None else f"by {own.name}"
    image = f"{c.vision.image_size} px, {layout}"
    text = f"{c.text.context_length} tokens of {c.text.vocab_size:,}"
    count = sum(math.prod(shape) for shape in flat_shapes(model).values())
    facts = {
        "parameters": f"{count / 1e6:,.1f} M",
        "image": "no tower" if c.vision.kind == "none" else image,
        "text": "no tower" if c.text.kind == "none" else text,
        "embedding": f"{c.vision.vectors} x " * (c.vision.vectors > 1) + f"{c.embed_dim}",
        "loss": c.loss,
    }
    if rules.prompts:
        named = ", ".join(f"{name} ({brief(prompt)})" for name, prompt in rules.prompts)
        facts["prompts"] = f"{named}; default: {rules.default_prompt or 'none'}"
    return facts
