"""Write the final bundle (or adapter) of a run."""

from vlm.bundle import Bundle
from vlm.inputs.tokenizer import Tokenizer
from vlm.training.run import Run
from vlm.training.step import Trainer, TrainState
from vlm.weights.adapter import AdapterOrigin


def export_bundle(run: Run, trainer: Trainer, state: TrainState, tokenizer: Tokenizer) -> Bundle:
    """Write and return the trained model as a bundle; in an adapter run, only the adapter."""
    e = run.experiment
    origin = None
    if e.adapter is not None:
        origin = AdapterOrigin(e.adapter, *run.base())
    bundle = Bundle(
        trainer.model(state),
        trainer.preprocess,
        tokenizer,
        name=e.name,
        adapter=origin,
        templates=e.data.templates,
    )
    if origin is None:
        bundle.save(run.bundle)
    else:
        bundle.save_adapter(run.bundle)
    return bundle
