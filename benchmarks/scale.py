"""What a data set of a million rows costs to open and to prepare: seconds, and memory above that of the program.

Only what is done for every row counts. The arrays that the trainer opens are holes on the disk, in shards as of
tools.preprocess; what the tools would measure or compute of the sounds is there already. Each line of the table is a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

ROWS_OF_A_SHARD = 50_000
PROMPTS_OF_A_SHARD = 100
TEXT, CODES = 20, 60  # of every utterance
MODEL = {"model_dim": 256, "layers": 4, "heads": 4, "max_text_tokens": 200, "max_mel_tokens": 400,
         "number_text_tokens": 1000, "number_mel_codes": 66, "start_mel_token": 64, "stop_mel_token": 65}


def hollow_array(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def make_manifest(folder: Path, rows: int) -> Path:
    """A manifest of `rows` pairs in shards. 10^6 rows: 700 MB."""
    manifest = folder / "train_pairs.jsonl"
    (folder / "config.yaml").write_text(json.dumps({"gpt": MODEL, "dataset": {"codec_sha256": "0" * 64}}))
    with manifest.open("w", encoding="utf-8") as handle:
        for first in range(0, rows, ROWS_OF_A_SHARD):
            shard = f"shard_{first // ROWS_OF_A_SHARD:03d}_of_{-(-rows // ROWS_OF_A_SHARD):03d}"
            (folder / shard).mkdir()
            count = min(ROWS_OF_A_SHARD, rows - first)
            hollow_array(folder / shard / "text_ids.npy", (count * TEXT,), "<i4")
            hollow_array(folder / shard / "codes.npy", (count * CODES,), "<i4")
            hollow_array(folder / shard / "condition.npy", (32 * PROMPTS_OF_A_SHARD, 256), "<f4")
            hollow_array(folder / shard / "emo_vec.npy", (PROMPTS_OF_A_SHARD, 256), "<f4")
            for i in range(count):
                prompt, target = i % PROMPTS_OF_A_SHARD, first + i
                name = f"p{first + prompt:08d}"
                handle.write(
                    f'{{"id":"t{target:08d}__{name}","speaker":"am","language":"am","prompt_language":"am",'
                    f'"target_language":"am","prompt_id":"{name}","prompt_audio_path":"audio/{name}.flac",'
                    f'"prompt_duration":3.219,"prompt_condition_path":"{shard}/condition.npy",'
                    f'"prompt_condition_start":{32 * prompt},"prompt_condition_len":32,'
                    f'"prompt_emo_vec_path":"{shard}/emo_vec.npy","prompt_emo_vec_start":{prompt},'
                    f'"target_id":"t{target:08d}","target_audio_path":"audio/t{target:08d}.flac",'
                    f'"target_text":"ስለሰብአዊ መብቶች ለማስተማር","target_text_ids_path":"{shard}/text_ids.npy",'
                    f'"target_text_ids_start":{TEXT * i},"target_text_len":{TEXT},'
                    f'"target_codes_path":"{shard}/codes.npy","target_codes_start":{CODES * i},'
                    f'"target_code_len":{CODES}}}\n')
    return manifest


def speaker_of(i: int) -> str:
    return f"s{i * 2654435761 % 2**32 * 200 >> 32:03d}"


def sentence(i: int) -> str:
    """One for each number, of eight words."""
    words = "ስለሰብአዊ መብቶች ለማስተማር የሚረዱ አንዳንድ ዘዴዎች ሰላም ለዓለም ውሃ ብርሃን ትምህርት ቤት መንገድ ከተማ ዛፍ ወንዝ".split()
    return " ".join(words[i >> 4 * place & 15] for place in range(8))


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def make_recordings(folder: Path, rows: int) -> Path:
    return write_rows(folder / "recordings.jsonl", (
        {"id": f"t{i:08d}", "text": sentence(i), "audio": f"audio/t{i:08d}.flac", "speaker": speaker_of(i),
         "language": "am"} for i in range(rows)))


def memory_mb(field: str) -> float:
    """VmRSS or VmHWM (the highest so far) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def open_manifest(folder: Path, rows: int) -> Callable[[], object]:
    from trainers import train_gpt_v2 as trainer

    manifest = make_manifest(folder, rows)
    return lambda: trainer.ManifestDataset([str(manifest)], trainer.model_config_from(MODEL, "config.yaml")).fingerprint


def build_pairs(folder: Path, rows: int) -> Callable[[], object]:
    from tools import build_pairs

    (folder / "config.yaml").write_text(json.dumps({"gpt": MODEL}))
    write_rows(folder / "utterances.jsonl", (
        {"id": f"t{i:08d}", "speaker": speaker_of(i), "language": "am", "split": "val" if i % 50 == 49 else "train",
         "text": sentence(i), "audio": f"audio/t{i:08d}.flac", "duration": 3.2, "text_ids_start": TEXT * i,
         "text_len": TEXT, "codes_start": CODES * i, "code_len": CODES, "emo_vec_start": i,
         **({"condition_start": 32 * i, "condition_len": 32} if i % 100 < 4 else {})} for i in range(rows)))
    return lambda: build_pairs.main(["--data-dir", str(folder)])


def filter_dataset(folder: Path, rows: int) -> Callable[[], object]:
    """Recordings of 2 to 14 seconds that are measured already."""
    from tools import clip_measures, filter_dataset

    path, draw = make_recordings(folder, rows), np.random.default_rng(0)
    width = (clip_measures.BANDS - 1) // 8
    with (folder / "filter_cache.jsonl").open("w") as cache:
        for i in range(rows):
            seconds = float(draw.uniform(2, 14))
            found = clip_measures.Measures(seconds, -20.0, 40.0, 0.0, 0.0, 0.1, seconds - 0.1, draw.bytes(
                width * int(seconds / clip_measures.HOP)).hex(), seconds - 0.2)
            name = json.dumps(["measures", filter_dataset.MEASURED_BY, f"audio/t{i:08d}.flac", 1, 1])
            cache.write(json.dumps([name, found.as_json()]) + "\n")
    filter_dataset.stamp_of = lambda path, sound: [sound, 1, 1]
    filter_dataset.path_within = lambda audio, audio_dir: audio_dir / audio
    filter_dataset.trim = lambda item, *rest: item.row
    filter_dataset.worst_clips = lambda *rest: []
    return lambda: filter_dataset.main([str(path)])


def preprocess(folder: Path, rows: int) -> Callable[[], object]:
    """Recordings whose features are computed already."""
    from tools import features, preprocess

    path = make_recordings(folder, rows)
    codes = np.zeros(CODES, np.int32)
    of_clip = {"codes": codes, "samples": np.array([CODES * 320]), "condition": np.zeros((32, 256), np.float32),
               "emo_vec": np.zeros((1, 256), np.float32)}
    preprocess.find_clip = lambda audio, audio_dir: features.Clip(audio, 1, 1)
    preprocess.fill_cache = lambda *rest: {}
    features.FeatureCache.read = lambda cache, clips: ((i, of_clip) for i in range(len(clips)))  # type: ignore
    return lambda: preprocess.main(["--recordings", str(path), "--codec", "processed_data/speech_codec.pt",
                                    "--tokenizer", "tokenizers/amharic_extended_bpe.model", "--output-dir",
                                    str(folder / "arrays")])


MEASURED = {"the trainer opens the manifest": open_manifest, "tools.build_pairs": build_pairs,
            "tools.filter_dataset": filter_dataset, "tools.preprocess": preprocess}


def measure(name: str, rows: int, scratch: Path) -> None:
    """Prints seconds and megabytes: this process's."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        work = MEASURED[name](Path(folder), rows)
        before, started, used = memory_mb("VmRSS"), time.perf_counter(), time.process_time()
        found = work()
        print(json.dumps([time.perf_counter() - started, time.process_time() - used, memory_mb("VmHWM") - before,
                          str(found)[:12]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="first command:\n  python -m benchmarks.scale --rows 100000")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="(100000 1000000)")
    parser.add_argument("--scratch", type=Path, default=None, help="700 MB for a million rows (the system's)")
    parser.add_argument("--only", choices=MEASURED, help="one line")
    args = parser.parse_args()
    if args.only:
        measure(args.only, args.rows[0], args.scratch)
        return
    print(f"{'':40}{'rows':>12}{'seconds':>10}{'on CPU':>10}{'MB':>8}")
    for name in MEASURED:
        for rows in args.rows:
            command = [sys.executable, "-m", "benchmarks.scale", "--only", name, "--rows", str(rows),
                       *(["--scratch", str(args.scratch)] if args.scratch else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds, busy, megabytes, _ = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:40}{rows:12,}{seconds:10.1f}{busy:10.1f}{megabytes:8.0f}", flush=True)


if __name__ == "__main__":
    main()
