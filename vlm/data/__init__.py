"""Where pairs come from and how they become batches.

Two kinds of source stand behind one interface, each with an exact and small position:

- *Random access* (`random_access`): TFDS, ArrayRecord, Arrow, tables, folders, indexed shards. A
  batch is a pure function of its step, so a position is the step and restoring costs nothing.
- *Streams* (`shards`, `lanes`): WebDataset tars and Parquet files, on disk or in a bucket, read
  front to back in large reads, several side by side in fixed *lanes*. A lane is a pure function of
  (seed, lane, names of the shards): which shards it reads in what order, the blocks in which its
  samples are shuffled, and which of them are bad. Nothing is indexed, memory is bounded by the
  lanes and the shuffle, and a position is five numbers a lane; restoring reads at most one block of
  each again. Processes own whole lanes, and so do their workers, so neither changes a batch.

A *mixture* draws each sample of a lane from one of several sources of either kind.

A sample goes down: source -> `examples` (features, captions, filters) -> `making` (opened,
augmented, one text) -> `random_access` or `lanes` (rows of a batch, tokens) -> grain's threads or
`workers` -> `pipeline`, whose iterator a run asks for batches and for its position. What is wrong
with a sample is a `faults.BadSample`: in a stream the next good one of its lane takes its place,
under random access another one that its position draws. Each is counted, and named in the run's
`bad-samples.jsonl`; too many end the run with one sentence.

A new kind of source is one module with an opener, and a line in `sources`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.data.pipeline import eval_batches as eval_batches
    from vlm.data.pipeline import train_batches as train_batches
    from vlm.data.sources import open_source as open_source
