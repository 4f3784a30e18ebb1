"""The entry point in the group `lmms_eval.models`. lmms-eval loads it while it is imported itself, so `lmms.py` would be too early."""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "mqt_llava",
        chat_class_path="mqt_llava.evaluation.lmms.MQTLlavaLmms",
        simple_class_path="mqt_llava.evaluation.lmms.MQTLlavaSimpleLmms",  # with --force_simple
        aliases=("mqt-llava",),
    )
