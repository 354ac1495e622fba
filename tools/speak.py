"""Speaks texts with espeak-ng: recordings for the demo, in a synthetic voice.

Each text of a JSON-lines file (id, text; optional split) becomes a 16-bit mono WAV without leading and trailing
silence, and a row of recordings.jsonl (id, speaker, text, language, split, audio). Texts take turns among the voices;
with --every-voice each voice speaks every text. Real recordings need no such step: write recordings.jsonl for them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from tools._common import Progress, ToolError, atomic_path, info, make_parser, read_jsonl, run_program, write_jsonl
from tools.amharic_text import normalise

FIRST_COMMAND = ("python -m tools.amharic_text build --output-dir build && "
                 "python -m tools.speak --texts build/texts.jsonl --output-dir build/recordings --limit 100")
# espeak-ng pauses at ASCII marks; some Ethiopic ones it reads out as words.
SPOKEN_MARKS = str.maketrans({"፣": ",", "፤": ",", "፥": ",", "።": "."})


def trim_silence(waveform: np.ndarray, sample_rate: int, threshold: float = 0.01, margin: float = 0.01) -> np.ndarray:
    """Cuts both ends where |sample| stays below `threshold` of the peak, keeping `margin` seconds. [n] -> [m].

    Trimming twice changes nothing.
    """
    loud = np.flatnonzero(np.abs(waveform) > threshold * np.max(np.abs(waveform), initial=0.0))
    if not len(loud):
        return waveform[:0]
    keep = round(margin * sample_rate)
    return waveform[max(0, loud[0] - keep) : loud[-1] + 1 + keep]


def speaker_of(voice: str) -> str:
    """A speaker name that is safe in paths and ids: am+f2 -> am_f2."""
    return voice.replace("+", "_")


def speak(text: str, voice: str, words_per_minute: int, path: Path) -> None:
    """One text to one WAV file. Text goes through standard input, so that nothing in it can be taken for an option."""
    spoken = normalise(text).translate(SPOKEN_MARKS)
    with atomic_path(path) as temporary:
        command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-b", "1", "--stdin", "-w", str(temporary)]
        result = subprocess.run(command, input=spoken.encode(), capture_output=True)
        if result.returncode or not temporary.is_file():
            reason = result.stderr.decode(errors="replace").strip() or "no sound written"
            raise ToolError(f"espeak-ng cannot speak {text!r} with voice {voice}: {reason}. `espeak-ng --voices=am` "
                            "lists the voices")
        waveform, sample_rate = soundfile.read(temporary, dtype="int16")
        trimmed = trim_silence(waveform.astype(np.float32), sample_rate).astype(np.int16)
        if not len(trimmed):
            raise ToolError(f"espeak-ng is silent on {text!r}. Remove this text or spell it in Ethiopic letters")
        soundfile.write(temporary, trimmed, sample_rate, subtype="PCM_16")


def plan_recordings(texts: Sequence[dict[str, str]], voices: Sequence[str], every_voice: bool) -> list[dict[str, str]]:
    """Rows of recordings.jsonl plus the voice to speak each with. Without `every_voice` the voices take turns."""
    rows = []
    for index, text in enumerate(texts):
        for voice in voices if every_voice else [voices[index % len(voices)]]:
            speaker = speaker_of(voice)
            name = f"{text['id']}_{speaker}"
            rows.append({"id": name, "speaker": speaker, "text": text["text"], "language": "am",
                         "split": text.get("split", "train"), "audio": f"wavs/{name}.wav", "voice": voice})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines with id and text")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets recordings.jsonl and wavs/")
    parser.add_argument("--voices", nargs="+", default=["am", "am+f2"], help="espeak-ng voices (default: am am+f2)")
    parser.add_argument("--words-per-minute", type=int, default=175)
    parser.add_argument("--every-voice", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--limit", type=int, default=0, help="only the first N texts (0 = all)")
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args(argv)
    if shutil.which("espeak-ng") is None:
        raise ToolError("espeak-ng is not installed. Install it: apt install espeak-ng (brew install espeak-ng)")
    texts = read_jsonl(args.texts, ["id", "text"], "`python -m tools.amharic_text build` writes such a file")
    rows = plan_recordings(texts[: args.limit or None], args.voices, args.every_voice)
    progress = Progress("speaking", len(rows))
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(speak, row["text"], row["voice"], args.words_per_minute, args.output_dir / row["audio"])
                for row in rows]
        try:
            for done, job in enumerate(jobs, 1):
                job.result()
                progress.update(done)
        finally:
            pool.shutdown(cancel_futures=True)
    for row in rows:
        del row["voice"]
    write_jsonl(args.output_dir / "recordings.jsonl", rows)
    info(f"{len(rows)} recordings -> {args.output_dir / 'recordings.jsonl'}")


if __name__ == "__main__":
    run_program(main)
