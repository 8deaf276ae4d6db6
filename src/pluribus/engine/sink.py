"""Where merged blocks go: memory, or preallocated shards with a journal beside them.

On disk everything happens in `OUT.partial`, next to the output. Each finished span is noted in a
journal line that carries its own checksum; after a kill at any point the same command reads the
journal, checks the noted blocks against their hashes, and goes on. The output appears under its
name by one rename, whole.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pluribus.core.errors import OutputError
from pluribus.core.formats.safetensors import header_bytes
from pluribus.core.source import ArraySource, TensorSpec, files
from pluribus.core.weights import Weights
from pluribus.engine.blocks import OUT, Reader, Span
from pluribus.engine.plan import Job, Plan

JOURNAL = "journal"
AFLOAT = 64 << 20  # bytes of output that may stay in the page cache once they are on their way


class MemorySink:
    """Keeps the result in memory."""

    def __init__(self, plan: Plan) -> None:
        self.raw = {job.name: np.empty(job.spec.nbytes, np.uint8) for job in plan.jobs}
        self.digests: dict[tuple[int, int], Mapping[str, list[str]]] = {}

    def write(self, job: Job, block: int, raw: np.ndarray) -> None:
        """See `Sink`."""
        at = block * job.block * job.spec.kind.size
        self.raw[job.name][at : at + raw.size] = raw

    def done(self, job: Job, span: int, digests: Mapping[str, list[str]]) -> None:
        """See `Sink`."""
        self.digests[job.index, span] = digests

    def finished(self, job: Job, span: int) -> bool:
        """See `Sink`."""
        return False

    def weights(self, plan: Plan, label: str) -> Weights:
        """Return the result."""
        sources = {job.name: ArraySource(self.raw[job.name], job.spec) for job in plan.jobs}
        return Weights(sources, label=label, aliases=plan.aliases, folder=plan.carry)


class FileSink:
    """Writes safetensors shards into `OUT.partial` and publishes them by a rename.

    `out` ends in .safetensors for a single file, else it is a folder with shards of at most
    `shard_bytes` and an index.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        shard_bytes: int | None,
        overwrite: bool,
        resume: bool,
        metadata: Mapping[str, str],
    ) -> None:
        self.plan, self.out, self.overwrite = plan, out, overwrite
        self.single = out.name.endswith(".safetensors")
        self.stage = out.with_name(out.name + ".partial")
        self._refuse_existing()
        check_parent(out)
        self.shards = self._layout(shard_bytes, metadata)
        self.digests: dict[tuple[int, int], Mapping[str, list[str]]] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        self._afloat: deque[tuple[int, int, int]] = deque()  # file, offset, size
        self._mutex = threading.Lock()
        self._lock_file: Any = None
        self._open(resume)

    # -- layout ----------------------------------------------------------------------------------

    def _layout(
        self, shard_bytes: int | None, metadata: Mapping[str, str]
    ) -> dict[str, tuple[bytes, dict[str, int], int]]:
        """Return head, tensor offsets and file size of every shard."""
        groups: list[dict[str, TensorSpec]] = [{}]
        filled = 0
        for name, spec in self.plan.specs.items():
            full = shard_bytes is not None and filled + spec.nbytes > shard_bytes
            if groups[-1] and full and not self.single:
                groups.append({})
                filled = 0
            groups[-1][name] = spec
            filled += spec.nbytes
        names = ["model.safetensors"]
        if self.single:
            names = [self.out.name]
        elif len(groups) > 1:
            count = len(groups)
            names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        shards = {}
        for name, group in zip(names, groups, strict=True):
            aliases = {k: v for k, v in self.plan.aliases.items() if v in group}
            head, offsets = header_bytes(group, {"format": "pt", **aliases, **metadata})
            size = len(head) + sum(spec.nbytes for spec in group.values())
            shards[name] = (head, offsets, size)
        return shards

    # -- opening ---------------------------------------------------------------------------------

    def _refuse_existing(self) -> None:
        if self.out.exists() and not self.overwrite:
            raise OutputError(
                f"{self.out}: exists already; choose another name, or pass --overwrite to replace "
                "it once the new output is whole"
            )
        if self.out.is_dir() and not _is_model(self.out):
            raise OutputError(
                f"{self.out}: is a folder with other things than a model in it, and --overwrite "
                "would remove them; choose another name"
            )
        if (
            self.stage.is_dir()
            and any(self.stage.iterdir())
            and not (self.stage / JOURNAL).exists()
        ):
            raise OutputError(
                f"{self.stage}: is where {self.out.name} would be prepared, but holds something "
                "else; move it, or choose another output"
            )

    def _restore(self) -> None:
        """Undo a replacement that was killed between its two renames."""
        old = self.out.with_name(self.out.name + ".replaced")
        if old.exists() and not self.out.exists():
            os.replace(old, self.out)

    def _open(self, resume: bool) -> None:
        token = (
            self.plan.digest() + zlib.crc32(repr(sorted(self.shards)).encode()).to_bytes(4).hex()
        )
        for head, _, _ in self.shards.values():
            token += f"{zlib.crc32(head):08x}"
        try:
            self.stage.mkdir(exist_ok=True)
            self._lock()
            self._restore()
            self._refuse_existing()
            lines, good = _read_journal(self.stage / JOURNAL)
            if resume and lines and lines[0] == ["plan", token] and self._shards_stand():
                self._lock_file.truncate(good)  # else new lines would join a torn one
            else:
                lines = []
                self._start(token)
            self._open_shards()
        except OSError as error:
            self.close()
            if isinstance(error, OutputError):
                raise
            raise self._explain(error) from None
        self._recall(lines[1:])

    def _lock(self) -> None:
        """Open the journal and keep other processes out for as long as it is open."""
        journal = self.stage / JOURNAL
        self._lock_file = journal.open("ab")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(self._lock_file.fileno()), os.stat(journal))
        except (BlockingIOError, FileNotFoundError):
            mine = False  # held, or just published, by somebody else
        except OSError:
            mine = True  # this filesystem has no locks
        if not mine:
            raise OutputError(
                f"{self.stage}: another process is writing it; wait for it, or choose another "
                "output"
            )

    def _shards_stand(self) -> bool:
        """Return whether every shard of the journal's plan is there in its full size."""
        found = {entry.name: entry.stat().st_size for entry in self.stage.iterdir()}
        return all(found.get(name) == size for name, (_, _, size) in self.shards.items())

    def _start(self, token: str) -> None:
        """Begin afresh: empty the journal, then preallocate the shards, then note the plan."""
        self._lock_file.truncate(0)
        for entry in self.stage.iterdir():
            if entry.name != JOURNAL:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        need = sum(size for _, _, size in self.shards.values())
        free = shutil.disk_usage(self.stage).free
        if need > free:
            self.close()
            shutil.rmtree(self.stage, ignore_errors=True)
            raise OutputError(
                f"{self.out}: needs {need / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free "
                f"there; free some space or choose another disk"
            )
        for name, (head, _, size) in self.shards.items():
            with open(self.stage / name, "wb") as file:
                file.write(head)
                file.flush()
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno == errno.ENOSPC:  # nothing is in it yet: give the space back
                        shutil.rmtree(self.stage, ignore_errors=True)
                        raise
                    file.truncate(size)
        self._note(["plan", token])

    def _open_shards(self) -> None:
        self._fds = []
        for number, (name, (_, offsets, _)) in enumerate(self.shards.items()):
            self._fds.append(os.open(self.stage / name, os.O_RDWR))
            self._offsets |= {tensor: (number, at) for tensor, at in offsets.items()}

    def _recall(self, lines: list[list[Any]]) -> None:
        """Take over the spans of an earlier run whose blocks still have the hashes it noted."""
        for kind, *rest in lines:
            if kind != "span":
                continue
            index, span, digests = rest
            job = self.plan.jobs[index]
            for block, digest in zip(Span(job, span).blocks, digests[OUT], strict=True):
                if Reader.digest(self._read(job, block)) != digest:
                    break
            else:
                self.digests[index, span] = digests

    def _read(self, job: Job, block: int) -> np.ndarray:
        fd, at = self._place(job, block)
        start = block * job.block
        count = min(job.block, job.spec.size - start)
        out = np.empty(count * job.spec.kind.size, np.uint8)
        view = memoryview(out)
        while view and (done := os.preadv(fd, [view], at)):
            view, at = view[done:], at + done
        return out

    def _place(self, job: Job, block: int) -> tuple[int, int]:
        number, at = self._offsets[job.name]
        return self._fds[number], at + block * job.block * job.spec.kind.size

    # -- writing ---------------------------------------------------------------------------------

    def write(self, job: Job, block: int, raw: np.ndarray) -> None:
        """See `Sink`. Raises OutputError if the disk is full; what is written stays resumable."""
        fd, at = self._place(job, block)
        view = memoryview(raw)
        try:
            while view:
                done = os.pwrite(fd, view, at)
                view, at = view[done:], at + done
        except OSError as error:
            raise self._explain(error) from None

    def done(self, job: Job, span: int, digests: Mapping[str, list[str]]) -> None:
        """See `Sink`."""
        self.digests[job.index, span] = digests
        self._note(["span", job.index, span, digests])
        self._flow(job, span)

    def _flow(self, job: Job, span: int) -> None:
        """Start writing a span to the disk, and drop from memory what was started `AFLOAT` ago.

        Left alone, the page cache would take memory for all of the output, push the inputs out of
        it, and then make every write wait for the disk.
        """
        blocks = Span(job, span).blocks
        if not blocks or not hasattr(os, "posix_fadvise"):
            return
        fd, start = self._place(job, blocks[0])
        size = len(blocks) * job.block * job.spec.kind.size
        with self._mutex:
            self._afloat.append((fd, start, size))
            let_go = []
            while sum(size for _, _, size in self._afloat) > AFLOAT:
                let_go.append(self._afloat.popleft())
        for file, offset, length in [(fd, start, size), *let_go]:
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)

    def finished(self, job: Job, span: int) -> bool:
        """See `Sink`."""
        return (job.index, span) in self.digests

    def _note(self, entry: list[Any]) -> None:
        text = json.dumps(entry, separators=(",", ":"))
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        try:
            while line:  # a disk that fills up takes a part, and refuses only the next
                line = line[os.write(self._lock_file.fileno(), line) :]
        except OSError as error:
            raise self._explain(error) from None

    def _explain(self, error: OSError) -> OutputError:
        why = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            why = "no space left on the disk; free some and run the same command to go on"
        return OutputError(f"{self.stage}: {why}")

    # -- publishing ------------------------------------------------------------------------------

    def publish(self, extra: Mapping[str, bytes]) -> None:
        """Write the small files, then give the output its name.

        A folder that stood there is moved aside first and removed last, so that one whole output
        exists at every moment.
        """
        names = list(self.shards)
        if len(names) > 1:
            weight_map = {t: n for n, (_, offsets, _) in self.shards.items() for t in offsets}
            index = {
                "metadata": {"total_size": self.plan.bytes_written},
                "weight_map": weight_map,
            }
            extra = {**extra, "model.safetensors.index.json": json.dumps(index, indent=2).encode()}
        try:
            for fd in self._fds:
                os.close(fd)
            self._fds = []
            if self.single:
                for name, data in extra.items():
                    self.out.with_name(f"{self.out.name}.{name}").write_bytes(data)
                os.replace(self.stage / names[0], self.out)
                self.close()
                self.tidy(self.out)
            else:
                for name, data in extra.items():
                    (self.stage / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.stage / name).write_bytes(data)
                self._swap()
        except OSError as error:
            raise self._explain(error) from None
        for name in names:
            files.refresh(str(self.out if self.single else self.out / name))

    def _swap(self) -> None:
        old = self.out.with_name(self.out.name + ".replaced")
        if old.exists():  # left by a run that was killed after its output was whole
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        if self.out.exists():
            os.replace(self.out, old)
        os.replace(self.stage, self.out)
        self.close()
        self.tidy(self.out)

    @staticmethod
    def tidy(out: Path) -> None:
        """Remove what a finished output no longer needs: journal, staging folder, replaced one."""
        if out.is_dir():
            (out / JOURNAL).unlink(missing_ok=True)
        for suffix in (".partial", ".replaced"):
            rest = out.with_name(out.name + suffix)
            if rest.exists() and not _held(rest / JOURNAL):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()

    def abandon(self) -> None:
        """After a failure: let go of the files, and remove them if no span was finished."""
        if not self.digests and self._lock_file is not None:
            shutil.rmtree(self.stage, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the files; what is written stays for a later run."""
        for fd in getattr(self, "_fds", []):
            os.close(fd)
        self._fds = []
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None


def check_parent(out: Path) -> None:
    """Raise OutputError unless there is a folder to write `out` into."""
    if out.parent.is_dir():
        return
    if out.parent.exists():
        raise OutputError(f"{out.parent}: is no folder to write {out.name} into; choose another")
    raise OutputError(f"{out.parent}: no such folder to write {out.name} into; create it")


def _is_model(folder: Path) -> bool:
    """Return whether a folder is empty, or a model's or an output's: safe to replace as a whole."""
    names = {entry.name for entry in folder.iterdir()}
    known = {"config.json", "adapter_config.json", "pluribus.json", "model.safetensors.index.json"}
    return not names or bool(names & known) or "model.safetensors" in names


def _held(journal: Path) -> bool:
    """Return whether a process is at work beside this journal."""
    try:
        with journal.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _read_journal(path: Path) -> tuple[list[list[Any]], int]:
    """Return the journal's whole lines up to the first damaged one, and their length in bytes."""
    entries, good = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        mark, _, text = line.partition(b" ")
        if mark != f"{zlib.crc32(text):08x}".encode():
            break
        entries.append(json.loads(text))
        good += len(line) + 1
    return entries, good
