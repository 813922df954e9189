"""Export of a Dockerfile and a compose file for the server and Prometheus."""

from pathlib import Path

from vlm._version import __version__
from vlm.errors import CheckpointError

DOCKERFILE = """\
# syntax=docker/dockerfile:1
FROM python:3.12-slim
RUN useradd --create-home vlm
# For a GPU: install vlm-jax[serve,cuda], and set `gpus: all` in compose.yaml.
RUN pip install --no-cache-dir "vlm-jax[serve]=={version}"
USER vlm
ENV VLM_CACHE=/home/vlm/cache
RUN mkdir -p /home/vlm/cache
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["vlm", "serve", "--host", "0.0.0.0", "--port", "8000"]
"""

COMPOSE = """\
# docker compose up --build
# Put the API keys, separated by commas, into a file .env in this folder:
#   VLM_API_KEYS=...
services:
  vlm:
    build: .
    command: [{command}]
    environment:
      VLM_API_KEYS: ${{VLM_API_KEYS:?set it in .env}}
    ports: ["127.0.0.1:8000:8000"]
    volumes:
{volumes}      - cache:/home/vlm/cache
    stop_grace_period: 40s
    restart: unless-stopped
    healthcheck:
      test:
        - CMD
        - python
        - -c
        - import urllib.request; urllib.request.urlopen("http://localhost:8000/healthz", timeout=10)
      interval: 30s
      timeout: 12s
      start_period: 300s
  prometheus:
    image: prom/prometheus:v3.5.0
    volumes:
      - ./prometheus.yml:/etc/prometheus/prometheus.yml:ro
      - prometheus:/prometheus
    ports: ["127.0.0.1:9090:9090"]
    restart: unless-stopped
volumes:
  cache:
  prometheus:
"""

PROMETHEUS = """\
global:
  scrape_interval: 15s
scrape_configs:
  - job_name: vlm
    static_configs:
      - targets: ["vlm:8000"]
"""


def write_compose(
    folder: Path, served: str, mounts: dict[Path, bool], options: tuple[str, ...] = ()
) -> list[Path]:
    """Write the Docker files into a new or empty folder, and return their paths.

    Args:
        served: the model or index, as on the command line of `vlm serve`.
        mounts: host folders that the container mounts at the same path, and whether each exists.
        options: additional command-line options.

    Raises:
        CheckpointError: the folder is not empty, or a folder to mount does not exist.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: choose another folder for the export")
    for path, exists in mounts.items():
        if not exists:
            raise CheckpointError(f"{path}, which the server needs, does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    command = ", ".join(_quoted(word) for word in (served, *options))
    volumes = "".join(f"      - {_quoted(f'{path}:{path}:ro')}\n" for path in mounts)
    texts = {
        "Dockerfile": DOCKERFILE.format(version=__version__),
        "compose.yaml": COMPOSE.format(command=command, volumes=volumes),
        "prometheus.yml": PROMETHEUS,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _quoted(word: str) -> str:
    """Return a quoted YAML string, with `$` escaped for compose."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"'
