"""Load models in a process of their own: a line of JSON asks, a line of JSON answers.

huggingface_hub reads its environment when it is imported. Here it is imported once, as that takes
longer than a load, and each request names its cache.
"""

import hashlib
import json
import os
import sys
import time

import numpy as np


def digest(bundle) -> str:
    """Of the parameters and of what texts become."""
    from vlm.weights.rules import flat_arrays

    found = hashlib.sha256()
    for name, array in sorted(flat_arrays(bundle.model)):
        found.update(name.encode() + np.asarray(array).tobytes())
    found.update(bundle.tokenizer(["a photo of a cat", "Two DOGS!"]).tobytes())
    return found.hexdigest()


def answer(cache: str, offline: bool = False, token: str | None = None, **options) -> dict:
    from huggingface_hub import constants

    import vlm
    from vlm.weights import hub

    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = cache, offline
    os.environ["VLM_CACHE"] = f"{cache}-of-vlm"
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        if options.pop("update", False):
            hub.update(options["model"])
        bundle = vlm.load(options.pop("model"), **options)
        return {"name": bundle.name, "digest": digest(bundle)}
    except vlm.VlmError as error:
        return {"error": str(error)}


def main() -> None:
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 4096  # what has arrived is kept in such pieces; 10 MB outside
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # between the client's own attempts
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
