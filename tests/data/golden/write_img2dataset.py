"""Writes golden/img2dataset/: one table of addresses in each output format of img2dataset.

Two of its 8 addresses are missing (404). Run it where img2dataset and TensorFlow are installed:
`python tests/data/golden/write_img2dataset.py`. `tensorflow_io` is replaced by an empty module, as
img2dataset needs it for storage systems only.
"""

import hashlib
import http.server
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

OUT = pathlib.Path(__file__).parent / "img2dataset"
FORMATS = ("webdataset", "parquet", "files", "tfrecord")
MISSING = (2, 5)


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        number = int(self.path.strip("/").removesuffix(".jpg"))
        data = jpeg(number)
        self.send_response(404 if number in MISSING else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def main() -> None:
    from img2dataset import download

    modules = pathlib.Path(tempfile.mkdtemp())  # for the processes that img2dataset starts
    (modules / "tensorflow_io.py").write_text("")
    os.environ["PYTHONPATH"] = str(modules)
    sys.path.append(str(modules))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    rows = [
        {
            "URL": f"http://127.0.0.1:{server.server_port}/{n}.jpg",
            "TEXT": f"picture {n}",
            "similarity": n / 10,
        }
        for n in range(8)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), OUT / "urls.parquet")
    for form in FORMATS:
        download(
            url_list=str(OUT / "urls.parquet"),
            input_format="parquet",
            url_col="URL",
            caption_col="TEXT",
            output_format=form,
            output_folder=str(OUT / form),
            image_size=384,
            resize_mode="keep_ratio",
            save_additional_columns=["similarity"],
            number_sample_per_shard=5,
            processes_count=1,
            thread_count=2,
            disable_all_reencoding=True,
        )
    found = [n for n in range(8) if n not in MISSING]
    digests = {f"picture {n}": hashlib.sha256(jpeg(n)).hexdigest() for n in found}
    (OUT / "digests.json").write_text(json.dumps(digests, indent=1))
    server.shutdown()


if __name__ == "__main__":
    main()
