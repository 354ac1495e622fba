"""Leaves out recordings that would harm a voice, and says why for each.

Reads a recordings.jsonl; writes beside it

  filtered.jsonl      the rows to train on, for preprocess; of trimmed clips the audio is in trimmed/
  rejected.jsonl      the others: row, id, reason, detail (every reason)
  filter_report.html  histograms, hours per speaker, why rows were left out, and the worst clips to listen to; one file
  trimmed/            clips whose ends had more than --most-silence seconds without speech, cut by a detector of speech
  filter_cache.jsonl  what has been measured; deleting it costs time only

The defaults keep good recordings, also of a telephone; every limit is a flag. Whether text and sound belong together is
told by the letters in a second of speech: those far from the usual of their speaker are left out. So are texts with
signs that cannot be said; decoration, such as emoji and stars, is passed over and counted. Copies of a sound are found
although they are quieter or were coded again. The sounds themselves are never changed. Run it again after a kill, or
when rows came: it measures only what is new.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools._common import Progress, ToolError, info, make_parser, run_program, warn, write_jsonl, write_text, writing_to
from tools.amharic_text import TEXT_RULES, Reading, is_amharic, letters_of, read_aloud
from tools.clip_files import Cache, size_of, stamp_of, write_clip
from tools.clip_measures import Measures, alike, measure_files, read_sound
from tools.features import compute_chunks
from tools.filter_report import Player, histogram, page, players, table
from tools.preprocess import ETHIOPIC, locked, say_skipped, skipped_row
from tools.recordings import read_recordings
from tools.sound_decoder import Sound, flac_bytes
from tools.sound_files import Unusable, path_within
from tools.text_rules import Tally, language_of, lost_signs
from trainers.train_gpt_v2 import available_cores

FIRST_COMMAND = "python -m tools.filter_dataset build/recordings/recordings.jsonl"
CHUNK = 32  # clips that a process measures at a time
WORTH_A_PROCESS = 64
MEASURED_BY = "measures/1"  # counted up when they are measured otherwise
FEWEST = 20  # rows of a speaker that tell what is usual for that one
SPREAD = 0.08  # of the logarithm of letters a second, at least: a good set may have next to none
KEPT_ENDS = 0.15  # seconds of silence that a trimmed clip keeps at each end
HEARD = 3  # clips for each reason in the report, at most
LONGEST_HEARD = 20  # seconds


@dataclass
class Item:
    """A row, what was measured of its sound, and what speaks against it."""

    number: int
    row: dict[str, Any]
    measures: Measures | None = None
    deviation: float = 0.0
    """Of letters a second, in robust standard deviations."""
    reasons: list[tuple[str, str]] = field(default_factory=list)

    @property
    def speaker(self) -> str:
        return str(self.row.get("speaker", ""))

    @functools.cached_property
    def reading(self) -> Reading:
        """Its text as tools.preprocess will read it, but for a tokenizer of other text rules."""
        return read_aloud(self.row["text"], language_of(self.row), TEXT_RULES)

    @functools.cached_property
    def letters(self) -> str:
        """What of its text can be heard."""
        return letters_of(self.reading.text, language_of(self.row), TEXT_RULES)

    @property
    def rate(self) -> float:
        """Letters in a second of speech."""
        assert self.measures is not None
        speech = self.measures.speech_end - self.measures.speech_start
        return len(self.letters) / speech if speech > 0 else 0.0

    def reject(self, reason: str, detail: str) -> None:
        self.reasons.append((reason, detail))


# ---------------------------------------------------------------------------------------------------------------------
# Reasons (pure)


def judge_text(item: Item, args: argparse.Namespace) -> None:
    text = item.row["text"]
    if not text.strip():
        item.reject("empty transcript", "the transcript is empty")
        return
    letters = [letter for letter in text if unicodedata.category(letter).startswith("L")]
    share = sum(bool(ETHIOPIC.match(letter)) for letter in letters) / max(1, len(letters))
    if is_amharic(language_of(item.row)) and share < args.least_ethiopic:
        item.reject("not Ethiopic", f"{share:.0%} of the letters are Ethiopic")
    lost = lost_signs(item.reading)
    if lost:
        item.reject("signs that cannot be said", f"{lost} cannot be said. Write the words that are said for it, or "
                                                 "remove it")


def judge_sound(item: Item, args: argparse.Namespace) -> None:
    found = item.measures
    assert found is not None
    if not found.speech_end:
        item.reject("no speech", "no speech is found")
        return
    speech = found.speech_end - found.speech_start
    for bad, reason, detail in (
            (speech < args.shortest, "too short", f"{speech:.2f} s of speech"),
            (speech > args.longest, "too long", f"{speech:.1f} s of speech"),
            (found.level < args.quietest, "too quiet", f"{found.level:.0f} dBFS"),
            (found.clipped > args.most_clipped, "clipped", f"{found.clipped:.2%} of the samples lie in flat tops"),
            (found.snr < args.least_snr, "noisy", f"{found.snr:.0f} dB from noise to voice"),
            (abs(found.offset) > args.most_offset, "DC offset", f"the mean of all samples is {found.offset:.3f}")):
        if bad:
            item.reject(reason, detail)


def judge_rates(items: Sequence[Item], most: float) -> None:
    """Robust z-scores of the logarithm of letters a second, within a speaker of many rows, else within all."""
    known = [item for item in items if item.measures and item.rate > 0]
    everyone = [math.log(item.rate) for item in known]
    by_speaker: dict[str, list[float]] = defaultdict(list)
    for item, value in zip(known, everyone, strict=True):
        by_speaker[item.speaker].append(value)
    usual = {name: centre_and_spread(values if len(values) >= FEWEST else everyone)
             for name, values in by_speaker.items()}
    for item, value in zip(known, everyone, strict=True):
        centre, spread = usual[item.speaker]
        item.deviation = (value - centre) / spread
        if abs(item.deviation) > most:
            item.reject("text and sound do not match", f"{item.rate:.1f} letters in a second of speech, where "
                                                       f"{math.exp(centre):.1f} are usual")


def centre_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and 1.48 times the median distance from it, at least SPREAD."""
    centre = statistics.median(values)
    return centre, max(SPREAD, 1.4826 * statistics.median(abs(value - centre) for value in values))


def judge_repeats(items: Sequence[Item], most: int) -> None:
    """Several rows for one file, and one speaker's texts that occur too often; the first ones stay."""
    by_audio: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_audio[os.path.normpath(item.row["audio"])].append(item)
    for audio, rows in by_audio.items():
        texts = {item.letters for item in rows}
        for item in rows if len(texts) > 1 else rows[1:]:
            item.reject("several texts for one file" if len(texts) > 1 else "two rows for one file",
                        f"{audio} has {len(rows)} rows and {len(texts)} texts")
    by_text: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        if not item.reasons:
            by_text[item.speaker, item.letters].append(item)
    for rows in by_text.values():
        for item in rows[most:]:
            item.reject("text said too often", f"it occurs {len(rows)} times")


def judge_copies(items: Sequence[Item]) -> None:
    """Of copies of one sound the loudest stays; where one is validation, the first one of validation."""
    heard = [item for item in items if item.measures and not item.reasons]
    pairs = alike([item.measures.print for item in heard if item.measures],
                  [item.measures.print_seconds for item in heard if item.measures],
                  Progress("comparing sounds", len(heard)))
    group = list(range(len(heard)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, k in pairs:
        one, other = sorted((root(i), root(k)))
        group[other] = one
    members: dict[int, list[Item]] = defaultdict(list)
    for i, item in enumerate(heard):
        members[root(i)].append(item)
    for copies in members.values():
        if len(copies) < 2:
            continue
        best = max(copies, key=lambda item: (is_validation(item), item.measures.level if item.measures else 0.0,
                                             -item.number))
        for item in copies:
            if item is not best:
                both = is_validation(best) and not is_validation(item)
                item.reject("sound of validation" if both else "copy of a sound", f"it is that of {best.row['id']!r}"
                            + (", a row of validation" if both else ""))


def is_validation(item: Item) -> bool:
    return item.row.get("split") == "val"


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure_all(items: Sequence[Item], audio_dir: Path, cache: Cache, jobs: int) -> None:
    """Sets measures, or the reason why there are none. Raises: ToolError when a process dies."""
    pending: list[tuple[Item, list[Any], Path]] = []
    for item in items:
        try:
            path = path_within(item.row["audio"], audio_dir)
            key = ["measures", MEASURED_BY, *stamp_of(path, item.row["audio"])]
        except Unusable as fault:
            item.reject(fault.reason, fault.detail)
            continue
        except OSError as error:
            item.reject("no such recording", f"{audio_dir / item.row['audio']}: {error.strerror}")
            continue
        found = cache.get(key)
        if found is None:
            pending.append((item, key, path))
        else:
            take(item, found)
    chunks = [pending[i: i + CHUNK] for i in range(0, len(pending), CHUNK)]
    progress, done = Progress("measuring", len(pending)), 0
    computed = compute_chunks(measure_files, chunks, min(jobs, max(1, len(pending) // WORTH_A_PROCESS)),
                              lambda chunk: [path for *_, path in chunk])
    with contextlib.closing(computed) as results:
        for chunk, measures in results:
            for (item, key, _), found in zip(chunk, measures, strict=True):
                cache.put(key, found)
                take(item, found)
            done += len(chunk)
            progress.update(done)


def take(item: Item, found: Any) -> None:
    """Measures or a fault, as the cache has them."""
    if isinstance(found, dict):
        item.measures = Measures(**found)
    else:
        item.reject(found[0], found[1])


def trim(item: Item, audio_dir: Path, folder: Path, cache: Cache, most: float) -> dict[str, Any]:
    """The row of a kept clip: of trimmed/ where an end has more than `most` seconds without speech."""
    found = item.measures
    assert found is not None
    if found.speech_start <= most and found.seconds - found.speech_end <= most:
        return item.row
    start, end = max(0.0, found.speech_start - KEPT_ENDS), min(found.seconds, found.speech_end + KEPT_ENDS)
    path = path_within(item.row["audio"], audio_dir)
    audio = f"trimmed/{os.path.splitext(item.row['audio'])[0].removeprefix('audio/')}.flac".replace("../", "")
    key = ["trimmed", *stamp_of(path, item.row["audio"]), start, end]
    known = cache.get(key)
    if not known or size_of(folder / audio) != known:
        sound, rate = read_sound(path)
        header = Sound(path, rate, 1, found.seconds, 16, False)
        content = flac_bytes(sound[round(start * rate): round(end * rate)][:, None], header)
        cache.put(key, write_clip(folder / audio, content))
    return {**item.row, "audio": audio, "duration": round(end - start, 3)}


# ---------------------------------------------------------------------------------------------------------------------
# Report and command line


def worst_clips(items: Sequence[Item], audio_dir: Path) -> list[Player]:
    """Some of each reason, and of the kept ones those nearest to a limit."""
    by_reason: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.measures and item.reasons:
            by_reason[item.reasons[0][0]].append(item)
    chosen = [(item, "; ".join(detail for _, detail in item.reasons)) for rows in by_reason.values()
              for item in sorted(rows, key=lambda item: -abs(item.deviation))[:HEARD]]
    kept = [item for item in items if item.measures and not item.reasons]
    chosen += [(item, f"kept; {item.measures.snr:.0f} dB from noise to voice") for item in
               sorted(kept, key=lambda item: item.measures.snr if item.measures else 0)[:HEARD] if item.measures]
    chosen += [(item, f"kept; {item.rate:.1f} letters in a second of speech") for item in
               sorted(kept, key=lambda item: -abs(item.deviation))[:HEARD]]
    clips = []
    for item, why in chosen:
        path = path_within(item.row["audio"], audio_dir)
        with contextlib.suppress(Unusable, OSError):  # gone since it was measured
            sound, rate = read_sound(path)
            header = Sound(path, rate, 1, 0, 16, False)
            clips.append(Player(item.row["id"], item.row["text"], why,
                                flac_bytes(sound[: LONGEST_HEARD * rate][:, None], header)))
    return clips


def tally_of(items: Sequence[Item]) -> Tally:
    """Signs and words of all texts."""
    tally = Tally()
    for item in items:
        tally.add(item.reading)
    return tally


def write_report(path: Path, items: Sequence[Item], audio_dir: Path) -> None:
    sides = [[item for item in items if item.measures and bool(item.reasons) == rejected] for rejected in (False, True)]

    def values(name: str) -> list[list[float]]:
        return [[getattr(item.measures, name) for item in side] for side in sides]

    rates = [[item.rate for item in side if item.rate] for side in sides]
    figures = "".join([histogram("Seconds", "s", *values("seconds")), histogram("Level of the voice", "dBFS",
                                                                                *values("level")),
                       histogram("From noise to voice", "dB", *values("snr")),
                       histogram("Letters in a second of speech", "", *rates)])
    hours: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for item in items:
        if item.measures:
            hours[item.speaker][bool(item.reasons)] += item.measures.seconds / 3600
    speakers = [(name or "(none)", round(good, 3), round(bad, 3))
                for name, (good, bad) in sorted(hours.items(), key=lambda pair: -pair[1][0])]
    reasons = Counter(item.reasons[0][0] for item in items if item.reasons)
    found = [(line,) for line in tally_of(items).lines()]
    kept = sum(not item.reasons for item in items)
    content = page(f"{kept} of {len(items)} recordings kept", [
        ("Why recordings are left out", table(["Reason", "Rows"], reasons.most_common()) if reasons else ""),
        ("Signs and words of the texts", table(["Found"], found) if found else ""),
        ("Histograms (blue: kept, red: left out)", figures),
        ("Hours per speaker", table(["Speaker", "Kept", "Left out"], speakers)),
        ("The worst clips", players(worst_clips(items, audio_dir)))])
    write_text(path, content)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: ToolError naming the flag."""
    if not 0 < args.shortest < args.longest:
        raise ToolError(f"--shortest {args.shortest:g} --longest {args.longest:g}: give seconds, the first ones fewer")
    for name in ("most_clipped", "most_offset", "most_deviation", "least_ethiopic", "most_silence"):
        if not getattr(args, name) >= 0:
            raise ToolError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    for name, least in (("most_repeats", 1), ("jobs", 0)):
        if getattr(args, name) < least:
            raise ToolError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("recordings", type=Path, metavar="RECORDINGS", help="recordings.jsonl")
    parser.add_argument("--audio-dir", type=Path, help="holds all recordings (the folder of RECORDINGS)")
    parser.add_argument("--shortest", type=float, default=0.4, help="seconds of speech (0.4)")
    parser.add_argument("--longest", type=float, default=30, help="seconds of speech (30)")
    parser.add_argument("--quietest", type=float, default=-50, help="level of the voice, dBFS (-50)")
    parser.add_argument("--most-clipped", type=float, default=0.005, help="share of samples (0.005)")
    parser.add_argument("--least-snr", type=float, default=12, help="dB from noise to voice (12)")
    parser.add_argument("--most-offset", type=float, default=0.05, help="of full scale (0.05)")
    parser.add_argument("--most-deviation", type=float, default=5, help="of letters a second, in robust standard "
                                                                        "deviations (5)")
    parser.add_argument("--least-ethiopic", type=float, default=0.5, help="share of the letters of Amharic texts (0.5)")
    parser.add_argument("--most-repeats", type=int, default=20, help="of one text by one speaker (20)")
    parser.add_argument("--most-silence", type=float, default=0.5, help="seconds at an end that are not trimmed (0.5)")
    parser.add_argument("--jobs", type=int, default=0, help="processes, 0 = one per core (0)")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def judge(items: Sequence[Item], args: argparse.Namespace) -> None:
    for item in items:
        judge_text(item, args)
        if item.measures:
            judge_sound(item, args)
    judge_repeats(items, args.most_repeats)
    judge_rates([item for item in items if not item.reasons], args.most_deviation)
    judge_copies(items)


def filter_all(items: Sequence[Item], audio_dir: Path, folder: Path, cache: Cache, args: argparse.Namespace
               ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes all files; returns the rows that are kept and those that are not. Raises: ToolError when none is kept."""
    measure_all(items, audio_dir, cache, args.jobs or available_cores())
    judge(items, args)
    kept = [trim(item, audio_dir, folder, cache, args.most_silence) for item in items if not item.reasons]
    rejected = [skipped_row(item.number, item.row["id"], item.reasons[0][0], f"{item.row['id']}: "
                            + "; ".join(detail for _, detail in item.reasons)) for item in items if item.reasons]
    write_report(folder / "filter_report.html", items, audio_dir)
    write_jsonl(folder / "rejected.jsonl", rejected)
    if not kept:
        (folder / "filtered.jsonl").unlink(missing_ok=True)  # an earlier run's would be taken for this one's
        raise ToolError(f"{args.recordings}: not one recording is left. {'; '.join(say_skipped(rejected))}")
    write_jsonl(folder / "filtered.jsonl", kept)
    cache.prune()
    return kept, rejected


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    folder = args.recordings.parent
    audio_dir = Path(os.path.realpath(args.audio_dir or folder))
    if args.audio_dir and audio_dir != Path(os.path.realpath(folder)):
        args.most_silence = math.inf  # a trimmed clip would lie outside of it
        info("with another --audio-dir no clip is trimmed")
    items = [Item(number, row) for number, row in enumerate(read_recordings(args.recordings), 1)]
    with locked(folder), writing_to(folder):
        cache = Cache(folder / "filter_cache.jsonl")
        try:
            kept, rejected = filter_all(items, audio_dir, folder, cache, args)
        finally:
            cache.close()
    seconds = sum(item.measures.seconds for item in items if item.measures and not item.reasons)
    trimmed = sum(row["audio"].startswith("trimmed/") for row in kept)
    info(f"{len(kept)} of {len(items)} recordings kept, {seconds / 3600:.2f} hours; {trimmed} trimmed")
    for line in say_skipped(rejected):
        warn(f"  {line}")
    for line in tally_of(items).lines():
        warn(line)
    info(f"-> {folder / 'filtered.jsonl'}, {folder / 'filter_report.html'}; next: tools.preprocess --recordings "
         f"{folder / 'filtered.jsonl'}")


if __name__ == "__main__":
    run_program(main)
