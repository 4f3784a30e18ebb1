"""Make a trained model small enough to ship with the package: bfloat16 weights, no copies of the modeling code.

python -m mqt_llava.training.export --model runs/stage2 --output_dir mqt_llava/checkpoints/mqt-llava-tiny
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from .. import MQTLlavaForConditionalGeneration, MQTLlavaProcessor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()

    if arguments.output_dir.exists() and any(arguments.output_dir.iterdir()):
        raise SystemExit(f"{arguments.output_dir} is not empty: remove it first")
    arguments.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output_dir.parent) as folder:
        partial = Path(folder) / "partial"
        MQTLlavaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.bfloat16).save_pretrained(
            partial
        )
        MQTLlavaProcessor.from_pretrained(arguments.model).save_pretrained(partial)
        for code in partial.glob("*.py"):  # the package that carries this folder has the code
            code.unlink()
        for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
            settings = json.loads((partial / name).read_text())
            for key in ("auto_map", "is_local", "local_files_only"):
                settings.pop(key, None)
            for part in settings.values():
                if isinstance(part, dict):
                    part.pop("auto_map", None)
                    part.pop("_name_or_path", None)  # a folder of the training
            (partial / name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for path in partial.iterdir():
            path.chmod(0o644)
        partial.replace(arguments.output_dir)


if __name__ == "__main__":
    main()
