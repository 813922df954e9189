"""What a finished run leaves: its model as a bundle, or the adapter that it trained."""

from vlm.bundle import Bundle
from vlm.inputs.tokenizer import Tokenizer
from vlm.train.run import Run
from vlm.train.step import Trainer, TrainState
from vlm.weights.adapter import AdapterOrigin


def export_bundle(run: Run, trainer: Trainer, state: TrainState, tokenizer: Tokenizer) -> Bundle:
    """The model of a run, written as a bundle; of a run with an adapter, that alone is written."""
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
