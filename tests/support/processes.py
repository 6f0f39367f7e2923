"""Two gloo processes on this machine: a test starts them, each runs the rest of its file."""

import contextlib
import os
import subprocess
import sys
import tempfile

from paths import SUPPORT


def run(script: str, *arguments: str, count: int = 2) -> None:
    """Runs `script` in `count` processes that can find each other; all of them must succeed.

    Once more where one was ended by a signal: gloo's threads can abort a process (see group()), 1
    of 30 runs on torch 2.13. What a script itself does wrong ends with a traceback, not a signal.
    """
    codes, output = _run_once(script, arguments, count)
    if any(code < 0 for code in codes):
        codes, output = _run_once(script, arguments, count)
    assert codes == [0] * count, f"{codes}\n" + "\n".join(output)


def _run_once(script: str, arguments: tuple[str, ...], count: int) -> tuple[list[int], list[str]]:
    path = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            subprocess.Popen(
                [sys.executable, script, *arguments],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), path])),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    "LOCAL_WORLD_SIZE": str(count),
                    # A file to meet at: no port that another program could take first.
                    "MEETING_PLACE": f"{folder}/store",
                    "OMP_NUM_THREADS": "1",
                    # Torch names the interface by the host's name, which need not resolve.
                    "GLOO_SOCKET_IFNAME": "lo",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            output = [worker.communicate(timeout=180)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    return [worker.returncode for worker in workers], output


@contextlib.contextmanager
def group():
    """What each process runs its part in. Ends the process: nothing after the block is run.

    Gloo's threads free the tensors of finished collectives, for which they need the interpreter.
    One that asks for it while Python shuts down is ended by Python inside a destructor, and the
    process aborts ("terminate called without an active exception"; 2 of 50 runs on torch 2.13).
    So a process whose work is done leaves without that shutdown.
    """
    import torch.distributed

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['MEETING_PLACE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    yield
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
