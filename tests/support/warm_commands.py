"""Commands in processes forked from one that is warm, ended or stopped before a file operation.

`Warm` starts this file as a process that imports everything once. Each command then runs in a fork
of it, which takes a tenth of a second, not five. In the fork an audit hook of the interpreter sees
the file operations below one folder, and sends the process a signal before the n-th: it knows
nothing of how the command is written. Writes and flushes raise no audit event, so the functions
of `os` that do them count too; a write is half done when the signal comes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Audit event -> where its paths are in the arguments, and the descriptor they are relative to.
EVENTS = {
    "os.rename": (0, 2),
    "os.remove": (0, 1),
    "os.mkdir": (0, 2),
    "os.rmdir": (0, 1),
    "os.truncate": (0, None),
    "os.link": (0, 2),
    "os.symlink": (1, 2),
}


class Warm:
    """Client of the warm process; close it."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def imports(self, *argv):
        """Runs a command in the warm process itself, for what it imports on the way."""
        return self._ask(here=[str(a) for a in argv])

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the warm process has ended"
        return json.loads(answer)

    def run(self, *argv, within, before=0, how="SIGKILL", renameat2=True):
        """A command to its end, or until a signal comes before operation number `before` (1 is the
        first). Returns its pid, exit status (negative: the signal), operations, and output."""
        return self._ask(
            argv=[str(a) for a in argv],
            within=str(within),
            before=before,
            how=how,
            renameat2=renameat2,
        )

    def go_on(self, run):
        """Wakes a process that was stopped by SIGSTOP; returns as `run`."""
        return self._ask(wake=run["pid"])

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Watch:
    """Counts the operations below a folder; a signal before the chosen one."""

    def __init__(self, within, before, how, log):
        self.within, self.before, self.how, self.log = within, before, how, log
        self.count = 0
        self.write = os.write
        for name in ("pwrite", "fsync", "posix_fallocate"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & WRITING:
                self.seen("open", os.fsdecode(path))
        elif event == "fcntl.flock":
            self.seen("flock", os.readlink(f"/proc/self/fd/{arguments[0]}"))
        elif event in EVENTS:
            where, folder = EVENTS[event]
            path = os.fsdecode(arguments[where])
            if folder is not None and arguments[folder] != -1:
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[folder]}"), path)
            self.seen(event.removeprefix("os."), path)

    def _counted(self, name, function):
        def counted(file, *arguments):
            path = os.readlink(f"/proc/self/fd/{file}")

            def half():
                if name == "pwrite":
                    data, offset = arguments
                    function(file, data[: len(data) // 2], offset)

            self.seen(name, path, half)
            return function(file, *arguments)

        return counted

    def seen(self, what, path, first=lambda: None):
        if not os.path.abspath(path).startswith(self.within + os.sep):
            return
        self.count += 1
        if self.count == self.before:
            first()
            os.kill(os.getpid(), getattr(signal, self.how))
        self.write(self.log, f"{what} {os.path.relpath(path, self.within)}\n".encode())


def child(request, output, log):
    from qlora_ext.cli import app, rename

    os.dup2(output, 1)
    os.dup2(output, 2)
    if not request["renameat2"]:
        rename._find_renameat2 = lambda: None
    sys.argv = ["qlora-ext", *request["argv"]]
    Watch(request["within"], request["before"], request["how"], log)
    try:
        app.run()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    os._exit(status)


def serve():
    import torch

    torch.set_num_threads(1)  # a process with torch's threads cannot be forked
    from qlora_ext.cli import app, merge, quantize  # noqa: F401

    logs = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "here" in request:
            with contextlib.redirect_stdout(sys.stderr):
                app.app(request["here"], standalone_mode=False)
            print("null", flush=True)
            continue
        if "wake" in request:
            pid = request["wake"]
            os.kill(pid, signal.SIGCONT)
        else:
            output, log = os.memfd_create("output"), os.memfd_create("log")
            pid = os.fork()
            if pid == 0:
                child(request, output, log)
            logs[pid] = output, log
        _, status = os.waitpid(pid, os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        # Not by seeking: the child's writes share the position.
        texts = [os.pread(file, 2**24, 0).decode() for file in logs[pid]]
        if not stopped:
            for file in logs.pop(pid):
                os.close(file)
        answer = {
            "pid": pid,
            "status": "stopped" if stopped else os.waitstatus_to_exitcode(status),
            "said": texts[0],
            "operations": texts[1].splitlines(),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
