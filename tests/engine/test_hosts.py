"""`LLM` in a script without a guard, in `python -c`, and in a notebook cell."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from jupyter_client.manager import KernelManager, start_new_kernel

CODE = """
from bireme import LLM, SamplingParams
llm = LLM("demo", tensor_parallel_size=2, dtype="float32")
print(llm.generate("The with statement", SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids)
llm.close()
"""


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == ""
    return done.stdout


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('once')" + CODE)
    lines = run(str(script)).splitlines()
    assert lines[0] == "once"
    assert len(lines) == 2
    assert lines[1].startswith("[")


def test_python_c_works() -> None:
    assert run("-c", CODE).startswith("[")


def test_files_in_the_current_folder_do_not_shadow_a_ranks_imports(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('shadowed')")
    code = f"import torch, os; os.chdir({str(tmp_path)!r})" + CODE
    assert run("-c", code).startswith("[")


def execute(client: object, code: str) -> tuple[str, str]:
    """(printed text, error name) of a cell."""
    text, error = [], ""

    def hook(message: dict[str, dict[str, object]]) -> None:
        nonlocal error
        content = message["content"]
        if message["msg_type"] == "stream":  # type: ignore[comparison-overlap]
            text.append(str(content["text"]))
        if message["msg_type"] == "error":  # type: ignore[comparison-overlap]
            error = str(content["ename"])

    client.execute_interactive(code, timeout=120, output_hook=hook)  # type: ignore[attr-defined]
    return "".join(text), error


def test_a_notebook_cell_works_and_ctrl_c_leaves_the_kernel_and_the_model_alive() -> None:
    manager: KernelManager
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        text, error = execute(client, CODE.replace("llm.close()", ""))
        assert (text[0], error) == ("[", "")
        interrupted = """
import os, signal
for delta in llm.stream([[5]], SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)):
    os.kill(os.getpid(), signal.SIGINT)
"""
        assert execute(client, interrupted)[1] == "KeyboardInterrupt"
        assert execute(client, "print(len(llm.generate([[5]], SamplingParams(max_tokens=2))))") == (
            "1\n",
            "",
        )
        assert execute(client, "llm.close()") == ("", "")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
