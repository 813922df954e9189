"""Benchmarks on this machine, compared with its measured and published limits."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.bench.data import bench_data as bench_data
    from vlm.bench.encode import bench_encode as bench_encode
    from vlm.bench.loss import bench_loss as bench_loss
    from vlm.bench.search import bench_search as bench_search
    from vlm.bench.train import bench_train as bench_train
