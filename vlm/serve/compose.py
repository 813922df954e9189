"""A Dockerfile and a compose file that run a server with Prometheus beside it."""

from pathlib import Path

from vlm._version import __version__
from vlm.errors import CheckpointError

DOCKERFILE = """\
# syntax=docker/dockerfile:1
FROM python:3.12-slim
RUN useradd --create-home vlm
# For a GPU: vlm-jax[serve,cuda], and `gpus: all` in compose.yaml.
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
# Keys, one or several with commas between them, go into a file .env beside this one:
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
    """Write the files into a new or empty folder, and return them.

    Args:
        served: the model or index, as `vlm serve` takes it.
        mounts: folders of this machine that the container reads at the same place, and whether
            each is there.
        options: more of the command line.

    Raises:
        CheckpointError: the folder holds something, or a folder to mount is not there.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: choose another place for the export")
    for path, there in mounts.items():
        if not there:
            raise CheckpointError(f"{path}, which the server would read, is not there")
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
    """A text in YAML, whatever is in it; compose takes `$` for a variable."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"'
