"""Data sources and input pipeline: image-text pairs as batches, with exact checkpoints.

There are two kinds of source, each with an exact and small position for checkpoints:

- *Random access* (`random_access`): TFDS, ArrayRecord, Arrow, tables, folders, indexed shards. A
  batch is a pure function of its step, so the position is the step and restoring is free.
- *Streams* (`shards`, `interleave`): WebDataset tars and Parquet files, on disk or in a bucket,
  read sequentially by a fixed number of interleaved readers, the *lanes*. A lane is a pure function
  of (seed, lane, names of the shards): the order of its shards, the blocks in which its
  samples are shuffled, and which samples are bad. No index is needed, memory is bounded by the
  lanes and the shuffle, and a position is five numbers per lane. Restoring re-reads at most one
  block per lane. A process or worker owns whole lanes, so their number does not change a batch.

A *mixture* draws each sample of a lane from one of several sources of either kind.

The steps of a sample: source -> `examples` (features, captions, filters) -> `transform_example`
(decode, augment, choose one text) -> `random_access` or `interleave` (batch, tokenize) -> grain's
threads or `workers` -> `pipeline`, whose iterator yields batches and its position. A sample that
cannot be used is a `faults.BadSample`. In a stream the next good sample of the lane replaces it;
under random access a random other one does. Bad samples are counted and listed in the run's
`bad-samples.jsonl`; too many stop the run with an error.

Functions raise a `DataError` for data that is missing, unreadable or not as described, and a
`ConfigError` for wrong settings.

To add a kind of source, write a module with `open_split` and add a line to `sources.kind_of`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.data.pipeline import eval_batches as eval_batches
    from vlm.data.pipeline import train_batches as train_batches
    from vlm.data.sources import all_captions as all_captions
    from vlm.data.sources import first_captions as first_captions
    from vlm.data.sources import open_source as open_source
