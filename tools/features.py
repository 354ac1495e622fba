"""Sounds to what the model reads (codes, condition, emo_vec): by many processes, in chunks that outlive a kill."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import stat
import threading
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from tools._common import Progress, ToolError, atomic_path, info, sha256_of, warn, writing_to
from tools.made_with import EMBEDDED
from tools.recordings import is_sound_name
from tools.sound_files import Unusable, load_recording, path_within
from tools.speech_codec import SpeechCodec
from trainers.train_gpt_v2 import available_cores

FORMAT = 2  # of chunks; counted up when their content changes, so that older ones are not used
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what np.load makes of a broken chunk

Item = TypeVar("Item")
Result = dict[str, np.ndarray] | tuple[str, str]
"""Features by name, or (reason, detail) why there are none."""


class Features(Protocol):
    """Turns sound into what the model reads."""

    def arrays(self, audio: Tensor, kind: str) -> dict[str, np.ndarray]:
        """Of mono `audio` [samples], float32, at the source's sample_rate. kind "codes": codes [c], int32, 0 to
        num_codes - 1; "condition": condition (of condition_shape), float32, what the model knows of a prompt's voice;
        and with one of the two (emo_vec_kind) the emotion vector emo_vec [1, model_dim], float32.
        """


class FeatureSource(Protocol):
    """What a worker process needs to make its own Features. Can be hashed and pickled."""

    def __hash__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def codec(self) -> Path: ...
    @property
    def sha256(self) -> str:
        """Of the codec."""
    @property
    def conditioning_sha256(self) -> str:
        """See tools.made_with; "" where there is none."""
    @property
    def sample_rate(self) -> int: ...
    @property
    def samples_per_code(self) -> int: ...
    @property
    def num_codes(self) -> int: ...
    @property
    def model_dim(self) -> int: ...
    @property
    def condition_shape(self) -> tuple[int, int]:
        """Of a prompt; [1, 192] in IndexTTS-2.5's layout."""
    @property
    def trims(self) -> bool:
        """Whether silence at both ends is cut off."""
    @property
    def most_samples(self) -> float:
        """Longer recordings are refused before anything is computed."""
    @property
    def emo_vec_kind(self) -> str:
        """"codes": every utterance has an emotion vector; "condition": only prompts do."""
    @property
    def worth_a_process(self) -> int:
        """Recordings; for fewer, a process would take longer to start than to work."""
    @property
    def jobs(self) -> int:
        """Processes where the user gives no number; 0 = one per core."""
    @property
    def largest_chunk(self) -> int:
        """Recordings; what a kill can cost each process."""

    def fingerprint(self, kind: str) -> str:
        """Equal for equal features."""

    def load(self) -> Features:
        """Raises: ToolError naming the file."""


class EmbeddedFeatures:
    """Those of tools.speech_codec, which needs no download."""

    def __init__(self, codec: SpeechCodec, model_dim: int, condition_shape: tuple[int, int]):
        self.codec, self.model_dim, self.condition_shape = codec, model_dim, condition_shape

    def arrays(self, audio: Tensor, kind: str) -> dict[str, np.ndarray]:
        if kind == "codes":
            return {"codes": self.codec.encode(audio).numpy().astype(np.int32)}
        condition, emo_vec = self.codec.condition(audio, self.model_dim, self.condition_shape)
        return {"condition": condition.numpy(), "emo_vec": emo_vec.numpy()[None]}


@dataclass(frozen=True)
class EmbeddedSource:
    """The FeatureSource of a codec file."""

    codec: Path
    sha256: str
    model_dim: int
    sample_rate: int
    samples_per_code: int
    num_codes: int
    condition_shape: tuple[int, int]

    name, conditioning_sha256 = EMBEDDED, ""
    trims, most_samples, emo_vec_kind = True, math.inf, "condition"
    jobs, worth_a_process, largest_chunk = 0, 64, 128

    @classmethod
    def of(cls, codec: Path, model_dim: int, condition_shape: tuple[int, int] | None = None) -> EmbeddedSource:
        """Without a shape that of IndexTTS2. Raises: ToolError for a missing codec, or what is none."""
        if not codec.is_file():
            raise ToolError(f"{codec}: no such codec. `python -m tools.speech_codec train` writes one")
        config = SpeechCodec.load(codec).config
        return cls(codec, sha256_of(codec), model_dim, config.sample_rate, config.samples_per_code, config.num_codes,
                   condition_shape or (32, model_dim))

    def fingerprint(self, kind: str) -> str:
        """Codes do not depend on the model's width."""
        width = self.model_dim if kind == "condition" else ""
        width = f"{width} speaker" if width and self.condition_shape[0] == 1 else width
        return hashlib.sha256(f"{FORMAT} {EMBEDDED} {self.sha256} {kind} {width}".encode()).hexdigest()

    def load(self) -> EmbeddedFeatures:
        return EmbeddedFeatures(SpeechCodec.load(self.codec), self.model_dim, self.condition_shape)


@functools.lru_cache(maxsize=1)
def load_features(source: FeatureSource) -> Features:
    """Raises: ToolError naming the file."""
    return source.load()


class Clip(NamedTuple):
    """A sound file as it was when it was found; changed size or time make another clip of it."""

    audio: str
    size: int
    mtime_ns: int


def find_clip(audio: str, audio_dir: Path) -> Clip:
    """`audio_dir` is free of links. Raises: Unusable for a path that leads nowhere, out of it, or to another kind of
    file."""
    path = path_within(audio, audio_dir)
    if not is_sound_name(path.name):
        raise Unusable("not a sound file's ending", f"{path}: ends in {path.suffix!r}. Give WAV, FLAC, OGG or MP3")
    try:
        status = path.stat()
    except OSError as error:
        raise Unusable("no such recording", f"{path}: {error.strerror}. Correct its path, or take the row out"
                       ) from error
    if not stat.S_ISREG(status.st_mode):
        raise Unusable("no such recording", f"{path}: not a file. Correct the path, or take the row out")
    return Clip(audio, status.st_size, status.st_mtime_ns)


def features_of(path: Path, source: FeatureSource, kind: str) -> dict[str, np.ndarray]:
    """Those of its kind, samples [1] (their number) and sha256 [32] of the file. Raises: Unusable."""
    features = load_features(source)
    audio = load_recording(path, source.sample_rate, source.trims)
    if kind == "codes" and len(audio) > source.most_samples:
        raise Unusable("recording too long", f"{path}: {len(audio) / source.sample_rate:.1f} s, the model takes "
                                             f"{source.most_samples / source.sample_rate:.1f}. Cut it into sentences")
    found = features.arrays(audio, kind)
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise Unusable("unusable sound", f"{path}: its {name} holds numbers that are not finite. Export the "
                                             "recording again")
    digest = np.frombuffer(bytes.fromhex(sha256_of(path)), np.uint8)
    return found | {"samples": np.array([len(audio)]), "sha256": digest}


def compute_chunk(clips: Sequence[Clip], audio_dir: Path, source: FeatureSource, kind: str) -> list[Result]:
    """For each clip its features, or (reason, detail). Runs in a worker process."""
    results: list[Result] = []
    for clip in clips:
        try:
            results.append(features_of(audio_dir / clip.audio, source, kind))
        except Unusable as fault:
            results.append((fault.reason, fault.detail))
        except torch.cuda.OutOfMemoryError as error:
            raise ToolError(f"{audio_dir / clip.audio}: the GPU's memory is full. Give fewer --jobs, or --device cpu; "
                            "what is computed is kept") from error
    return results


def start_worker() -> None:
    """One thread; a parent that was killed takes its workers with it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def compute_chunks(compute: Callable[[Any], list[Any]], chunks: Sequence[Sequence[Item]], jobs: int,
                   part: Callable[[Sequence[Item]], Any] = list
                   ) -> Generator[tuple[Sequence[Item], list[Any]], None, None]:
    """Each chunk with its results, in the order of completion. `part` is what of a chunk `compute` gets.

    Raises: ToolError when a worker process dies.
    """
    if min(jobs, len(chunks)) < 2:
        for chunk in chunks:
            yield chunk, compute(part(chunk))
        return
    with ProcessPoolExecutor(min(jobs, len(chunks)), multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            # Workers inherit the mask: Ctrl-C goes to the whole group, but is the parent's to handle.
            unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            futures = {pool.submit(compute, part(chunk)): chunk for chunk in chunks}
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ToolError("a worker process died, perhaps for lack of memory. Lower --jobs and run the same command "
                            "again: what is computed is kept") from error
        except (KeyboardInterrupt, GeneratorExit):  # a chunk may take minutes; what it had is computed again
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class FeatureCache:
    """chunks/KIND_*.npz: features that are already computed, and for which sound files."""

    def __init__(self, folder: Path, kind: str, source: FeatureSource):
        self.folder, self.kind, self.source = folder, kind, source
        self.stem = f"{kind}_{source.fingerprint(kind)[:16]}"
        self.places: dict[Clip, tuple[Path, int]] = {}
        self.contents: dict[tuple[int, bytes], tuple[Path, int]] = {}
        """By size and SHA-256 of the sound file."""
        paths = sorted(folder.glob(f"{self.stem}_*.npz"))
        progress = Progress(f"finished chunks of {kind}", len(paths))
        for done, path in enumerate(paths, 1):
            progress.update(done)
            try:
                with np.load(path) as arrays:
                    clips = json.loads(arrays["clips"].tobytes())
                    digests = arrays["sha256"] if "sha256" in arrays.files else np.zeros(0, np.uint8)
            except DAMAGED as error:
                warn(f"{path}: damaged ({error}); its recordings are computed again")
                continue
            self.places.update({Clip(*clip): (path, i) for i, clip in enumerate(clips)})
            self.contents.update({(Clip(*clips[i]).size, digest.tobytes()): (path, i)
                                  for i, digest in enumerate(digests.reshape(-1, 32))})

    def find_moved(self, clips: Sequence[Clip], audio_dir: Path) -> None:
        """Gives clips that were copied, renamed or touched the features of the file that had their very bytes."""
        sizes = {size for size, _ in self.contents}
        alike = [clip for clip in clips if clip not in self.places and clip.size in sizes]
        progress = Progress("comparing recordings with finished ones", len(alike))
        for done, clip in enumerate(alike, 1):
            try:
                digest = bytes.fromhex(sha256_of(audio_dir / clip.audio))
            except OSError:  # it is named when its turn comes
                continue
            if (clip.size, digest) in self.contents:
                self.places[clip] = self.contents[clip.size, digest]
            progress.update(done)

    def load_chunk(self, path: Path) -> dict[str, list[np.ndarray]]:
        try:
            with np.load(path) as arrays:
                names = [name for name in arrays.files if f"{name}_len" in arrays.files]
                return {name: np.split(arrays[name], np.cumsum(arrays[f"{name}_len"])[:-1]) for name in names}
        except DAMAGED as error:
            raise ToolError(f"{path}: damaged ({error}). Delete it and run the same command again") from error

    def read(self, clips: Sequence[Clip]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Each clip's place in `clips` and its features, in the order of the chunks: each is read once, and only one is
        in memory. Raises: ToolError for a damaged chunk."""
        by_chunk: dict[Path, list[tuple[int, int]]] = {}
        for number, clip in enumerate(clips):
            path, index = self.places[clip]
            by_chunk.setdefault(path, []).append((number, index))
        for path, places in by_chunk.items():
            chunk = self.load_chunk(path)
            for number, index in places:
                yield number, {name: parts[index] for name, parts in chunk.items()}

    def add(self, clips: Sequence[Clip], features: Sequence[dict[str, np.ndarray]]) -> None:
        """Raises: ToolError when it cannot be written."""
        digest = hashlib.sha256(json.dumps(clips).encode()).hexdigest()[:16]
        path = self.folder / f"{self.stem}_{digest}.npz"
        arrays = {"clips": np.frombuffer(json.dumps(clips).encode(), np.uint8)}
        for name in features[0]:
            arrays[name] = np.concatenate([values[name] for values in features])
            arrays[f"{name}_len"] = np.array([len(values[name]) for values in features])
        with writing_to(self.folder), atomic_path(path) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
        self.places.update({clip: (path, i) for i, clip in enumerate(clips)})

    def prune(self, used: Iterable[Clip], named: Set[str]) -> None:
        """Deletes the chunks of this codec and kind that nothing will ask for: damaged ones, and those whose clips are
        all no more `named` (audio paths) or have changed since. A named clip that is missing now may come back.

        So the folder grows with every codec and width that was tried, and with former prompts: to at most the features
        of every named recording for each of them. Deleting it frees that, and costs time only.
        """
        used = set(used)
        there = {clip.audio for clip in used}
        keep = {path for clip, (path, _) in self.places.items()
                if clip in used or (clip.audio in named and clip.audio not in there)}
        for path in self.folder.glob(f"{self.stem}_*.npz"):
            if path not in keep:
                path.unlink()


def chunk_size(pending: int, jobs: int, largest: int) -> int:
    """Recordings per chunk: small enough to deal the work evenly, and to lose little to a kill."""
    return max(4, min(largest, pending // (8 * jobs)))


def fill_cache(cache: FeatureCache, clips: Sequence[Clip], audio_dir: Path, jobs: int) -> dict[Clip, tuple[str, str]]:
    """Computes what the cache lacks of these clips, in at most `jobs` processes (0 = one per core).

    Returns (reason, detail) of those that cannot be used.
    """
    cache.find_moved(clips, audio_dir)
    pending = [clip for clip in dict.fromkeys(clips) if clip not in cache.places]
    source = cache.source
    jobs = min(jobs or source.jobs or available_cores(), max(1, len(pending) // source.worth_a_process))
    size = chunk_size(len(pending), jobs, source.largest_chunk)
    chunks = [pending[i : i + size] for i in range(0, len(pending), size)]
    if pending:
        info(f"{cache.kind}: {len(pending)} of {len(set(clips))} recordings to compute, {min(jobs, len(chunks))} at a "
             "time")
    faults: dict[Clip, tuple[str, str]] = {}
    progress = Progress(cache.kind, len(pending))
    done, samples = 0, 0
    # Closed at once when a chunk cannot be written: else the other chunks would be computed first.
    compute = functools.partial(compute_chunk, audio_dir=audio_dir, source=source, kind=cache.kind)
    with contextlib.closing(compute_chunks(compute, chunks, jobs)) as computed:
        for chunk, results in computed:
            good = {clip: r for clip, r in zip(chunk, results, strict=True) if isinstance(r, dict)}
            faults.update({clip: r for clip, r in zip(chunk, results, strict=True) if isinstance(r, tuple)})
            if good:
                cache.add(list(good), list(good.values()))
            done += len(chunk)
            samples += sum(int(r["samples"][0]) for r in good.values())
            progress.update(done, f"{samples / source.sample_rate / 3600:.2f} hours of speech")
    return faults
