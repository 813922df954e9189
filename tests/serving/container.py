"""Run the service of an exported compose file without a container engine.

The image is the files of the wheel beside the packages of this environment. As root, the command
gets a root folder of its own, as a container does: everything read-only except /tmp and the cache,
only the mounts of the compose file below /tmp, the user of the compose file, no capabilities, and
no new privileges. Without root it runs as the present user, with the cache at another path.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

# $1: new root. What all users can read is visible there, read-only, except /tmp. $2: the cache.
ROOT = r"""
set -e
umask 022
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
for place in /*; do
  name=$(basename "$place")
  if [ -L "$place" ]; then ln -s "$(readlink "$place")" "$1/$name"
  elif [ "$name" = tmp ]; then mkdir -m 1777 "$1/tmp"
  elif [ -d "$place" ] && ! (stat -c %A "$place" | grep -q 'r.x$\|r.t$'); then mkdir "$1/$name"
  elif [ -d "$place" ]; then mkdir "$1/$name" && mount --rbind "$place" "$1/$name"
    case $name in dev|proc|sys) ;; *) mount -o remount,bind,ro "$1/$name" ;; esac
  fi
done
mkdir "$1/cache" && mount --bind "$2" "$1/cache"
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
"""


def can_isolate():
    """Whether this process may make a root folder for another one."""
    tools = all(map(shutil.which, ("unshare", "setpriv", "chroot")))
    if os.path.realpath(sys.prefix).startswith("/tmp/"):  # which the new root hides
        return False
    if os.getuid() or not tools:
        return False
    trial = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(trial, capture_output=True).returncode == 0


class Container:
    """Service `vlm` of the compose file in `folder`.

    Args:
        work: empty folder for the image and the cache volume.
        port: port that the container's port 8000 is published at.
    """

    def __init__(self, folder: Path, work: Path, port: int):
        keys = dict(line.split("=", 1) for line in lines(folder / ".env") if line[0] != "#")
        keys = {name: value.strip("'") for name, value in keys.items()}
        text = (folder / "compose.yaml").read_text()
        for name, value in keys.items():
            for tail in (":?set it in .env}", ":-8g}"):
                text = text.replace("${" + name + tail, value)
        self.key, self.service = keys["VLM_API_KEYS"], yaml.safe_load(text)["services"]["vlm"]
        self.image = [line.split(" ", 1) for line in lines(folder / "Dockerfile")]
        self.cache, self._site, self._root = work / "cache", work / "site", work / "root"
        for path in (self.cache, self._site, self._root):
            path.mkdir(parents=True)
        self._install(next(folder.glob("*.whl")))
        self.isolated = can_isolate()
        self._port = str(port)
        assert self.service["ports"] == [f"127.0.0.1:{port}:8000"]

    def _install(self, wheel):
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*line, "--target", self._site, wheel], check=True, capture_output=True)

    def words(self, instruction):
        return [words for name, words in self.image if name == instruction]

    @property
    def command(self):
        (entry,) = self.words("ENTRYPOINT")
        words = [*json.loads(entry), *(w.replace("$$", "$") for w in self.service["command"])]
        assert words.count("8000") == 1
        return [self._port if word == "8000" else word for word in words]

    @property
    def environment(self):
        pairs = [word for line in self.words("ENV") for word in shlex.split(line)]
        found = dict(pair.split("=", 1) for pair in pairs)
        given = self.service["environment"]
        found |= {name: value for name, value in given.items() if value is not None}
        found |= {"PYTHONPATH": str(self._site), "JAX_PLATFORMS": "cpu"}
        found["PATH"] = f"{self._site}/bin:{os.path.dirname(sys.executable)}:/usr/bin:/bin"
        if not self.isolated:
            found = {n: v.replace("/cache", str(self.cache), 1) for n, v in found.items()}
        return found

    def start(self, words=None, **options):
        """Start a command in the container; by default its own."""
        words = words or self.command
        if not self.isolated:
            return subprocess.Popen(words, env=self.environment, cwd="/", **options)
        uid, gid = self.service["user"].split(":")
        os.chown(self.cache, int(uid), int(gid))
        mounts = [(v["source"], v["target"]) for v in self.service["volumes"]]
        mounts = [(path, path) for path in (str(self._site), sys.base_prefix)] + mounts
        script = ROOT
        for source, target in mounts:
            if source == "cache":
                continue
            assert source == target
            at = f'"$1"{shlex.quote(target)}'
            is_folder = os.path.isdir(source)
            script += f"mkdir -p {at if is_folder else f'$(dirname {at})'}\n"
            script += "" if is_folder else f"touch {at}\n"
            script += f'mount --bind {shlex.quote(source)} "$1"{shlex.quote(target)}\n'
            script += f'mount -o remount,bind,ro "$1"{shlex.quote(target)}\n'
        script += 'mount -o remount,ro "$1"\nroot=$1\nshift 2\n'
        script += 'exec chroot "$root" setpriv "$@"\n'
        drop = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        line = ["unshare", "-m", "sh", "-c", script, "sh", self._root, self.cache]
        line += [f"--reuid={uid}", f"--regid={gid}", *drop]
        inside = [f"{name}={value}" for name, value in self.environment.items()]
        line = [*map(str, line), "env", "-i", *inside, *words]
        return subprocess.Popen(line, cwd="/", **options)

    def run(self, words):
        """Run a command in the container and return what it printed."""
        process = self.start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    @property
    def health_check(self):
        kind, *words = self.service["healthcheck"]["test"]
        assert kind == "CMD"
        return [word.replace(":8000/", f":{self._port}/") for word in words]


def lines(path):
    """Lines of a file that are not empty."""
    return [line for line in path.read_text().splitlines() if line]
