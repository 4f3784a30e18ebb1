"""7B in bfloat16 on a CPU that has no units for it: time to first token with and without `mqt_llava.cpu`, in alternating rounds.

    python -m benchmarks.cpu_path [--avx2] [--num_visual_tokens 256 16] [--repeats 2] [--output_dir docs/benchmarks]

`--avx2` keeps torch, oneDNN and MKL from newer instructions than AVX2, as on CPUs that have no others. Random weights of all
layers, one image and 40 text tokens.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
COLUMNS = {"m": (1, "d"), "plain": (1, ",.2f"), "float32": (1, ",.2f"), "speed-up": (1, ".2f")}
COLUMNS |= {"step, plain": (1, ",.2f"), "step, float32": (1, ",.2f"), "same tokens": (None, "s")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", default=[256, 16])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--preset", choices=["7b-cpu", "tiny"], default="7b-cpu")
    parser.add_argument("--output_dir", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    if arguments.avx2 and not AVX2.items() <= os.environ.items():  # the libraries read them when they are loaded
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.cpu_path", *sys.argv[1:]], os.environ | AVX2)

    import numpy as np
    import torch

    from benchmarks.generation import PRESETS
    from benchmarks.measure import Stopwatch, interleave, machine, markdown
    from benchmarks.models import IMAGE_TOKEN, LINEAR, TEXT_TOKENS, configs
    from mqt_llava import MQTLlavaForConditionalGeneration
    from mqt_llava.cpu import Float32Linear, compute_in_float32, is_slow

    torch.manual_seed(0)
    config = configs(PRESETS[arguments.preset])[1]
    setting = f"{machine(torch.device('cpu'))}. float32 is {'' if is_slow(torch.bfloat16) else 'not '}chosen here."
    model = compute_in_float32(MQTLlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    side = config.vision_config.image_size
    pixel_values = torch.randn(1, 3, side, side, dtype=torch.bfloat16)
    answers = {}

    def measure(m, way):
        ids = torch.arange(1000, 1000 + TEXT_TOKENS + m)[None]
        ids[:, 1 : 1 + m] = IMAGE_TOKEN
        stopwatch = Stopwatch()
        with mock.patch.object(Float32Linear, "forward", LINEAR if way == "plain" else Float32Linear.forward):
            answers[m, way] = model.generate(
                input_ids=ids, pixel_values=pixel_values, max_new_tokens=4, do_sample=False, streamer=stopwatch
            )[0, ids.shape[1] :].tolist()
        return stopwatch.result()

    cases = [(m, way) for m in arguments.num_visual_tokens for way in ("plain", "float32")]
    results, _ = interleave({case: partial(measure, *case) for case in cases}, arguments.repeats)
    rows = []
    for m in arguments.num_visual_tokens:
        (plain, plain_step), (fast, fast_step) = results[m, "plain"].T, results[m, "float32"].T
        same = sum(a == b for a, b in zip(answers[m, "plain"], answers[m, "float32"]))
        times = {"plain": plain, "float32": fast, "speed-up": plain / fast}
        times |= {"step, plain": plain_step, "step, float32": fast_step}
        row = {name: float(np.median(values)) for name, values in times.items()}
        rows.append({"m": m, **row, "same tokens": f"{same} of {len(answers[m, 'plain'])}"})
    legend = f"Seconds to the first token and for a further one, medians of {arguments.repeats} rounds."
    table = f"{setting} {legend}\n\n{markdown(rows, COLUMNS)}"
    print(table)
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        name = "cpu_path_avx2.md" if arguments.avx2 else "cpu_path.md"
        (arguments.output_dir / name).write_text(table)


if __name__ == "__main__":
    main()
