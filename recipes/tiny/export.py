"""Make a trained model small enough to ship with the package: bfloat16 weights, links to the modeling code.

python -m recipes.tiny.export --model runs/stage2 --output_dir mqt_llava/checkpoints/mqt-llava-tiny
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig

from mqt_llava import MQTLlavaForConditionalGeneration, MQTLlavaProcessor, modeling


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
        model = MQTLlavaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.bfloat16)
        text = model.config.text_config
        special = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(
            **special, suppress_tokens=[model.config.image_token_id], use_cache=True
        )
        model.save_pretrained(partial)
        MQTLlavaProcessor.from_pretrained(arguments.model).save_pretrained(partial)
        for code in partial.glob("*.py"):  # the repository has one copy of the code; a wheel has the files
            code.unlink()
            code.symlink_to(Path(os.path.relpath(modeling.__path__[0], arguments.output_dir), code.name))
        for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
            settings = json.loads((partial / name).read_text())
            for key in ("is_local", "local_files_only", *(["auto_map"] if name == "tokenizer_config.json" else [])):
                settings.pop(key, None)  # the tokenizer is an ordinary one
            for part in settings.values():
                if isinstance(part, dict):
                    part.pop("_name_or_path", None)  # a folder of the training
            (partial / name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for path in partial.iterdir():
            if not path.is_symlink():
                path.chmod(0o644)
        partial.replace(arguments.output_dir)


if __name__ == "__main__":
    main()
