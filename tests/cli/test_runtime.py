"""What a command sets before JAX starts."""

import importlib.util
import os
import subprocess
import sys

import pytest

from vlm.cli import runtime


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with libtpu, no TPU, no other device's plugin and no word of its user."""
    found = {"libtpu"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in found else None
    )
    monkeypatch.setattr(runtime.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(runtime, "TPU_DEVICES", (f"{tmp_path}/accel[0-9]*",))
    for name in list(os.environ):
        if name in (*runtime.TPU_VARIABLES, "JAX_PLATFORMS"):
            monkeypatch.delenv(name)
    return found


def chosen(monkeypatch):
    runtime.leave_out_absent_tpu()
    value = os.environ.get("JAX_PLATFORMS")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return value


def test_libtpu_without_a_tpu_is_left_out(machine, monkeypatch):
    assert chosen(monkeypatch) == "cpu"


def test_a_device_is_left_to_jax(machine, monkeypatch, tmp_path):
    machine.discard("libtpu")
    assert chosen(monkeypatch) is None
    machine |= {"libtpu", "jax_plugins"}  # of CUDA, ROCm or another
    assert chosen(monkeypatch) is None
    machine.discard("jax_plugins")
    monkeypatch.setattr(runtime.metadata, "entry_points", lambda group: ["a plugin"])
    assert chosen(monkeypatch) is None
    monkeypatch.setattr(runtime.metadata, "entry_points", lambda group: [])
    (tmp_path / "accel0").touch()
    assert chosen(monkeypatch) is None
    (tmp_path / "accel0").unlink()
    for name in ("TPU_WORKER_ID", "CLOUD_TPU_TASK_ID", "COLAB_TPU_ADDR", "JAX_FORCE_TPU_INIT"):
        monkeypatch.setenv(name, "0")
        assert chosen(monkeypatch) is None
        monkeypatch.delenv(name)
    assert chosen(monkeypatch) == "cpu"


@pytest.mark.parametrize("platforms", ["cuda,cpu", "tpu", ""])
def test_what_the_user_says_holds(machine, monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert chosen(monkeypatch) == platforms


@pytest.mark.slow
def test_a_command_is_silent_where_libtpu_is_installed():
    if runtime.TPU_DEVICES and any(map(runtime.glob.glob, runtime.TPU_DEVICES)):
        pytest.skip("this machine has a TPU")
    code = "import vlm.cli; vlm.cli.main(['models', '--help']); import jax; jax.devices()"
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    env |= {"TPU_SKIP_MDS_QUERY": "1"}  # as JAX leaves it for what is started from Python
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
