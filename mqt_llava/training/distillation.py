"""Self-distillation: each step runs with two numbers of visual tokens, and the smaller one learns from the larger one."""

from torch.nn import functional as F

from ..modeling.budget_mqt_llava import rebudget
from .sampling import VisualTokenSampler
from .trainer import MQTLlavaTrainer


class DistillationTrainer(MQTLlavaTrainer):
    r"""
    A [`MQTLlavaTrainer`] whose loss adds to the cross-entropy at the m that was drawn a term for a second, smaller m'
    ([`VisualTokenSampler.sample_below`]):

        loss = cross_entropy(m) + weight * (cross_entropy(m') + temperature**2 * KL(predictions at m || predictions at m'))

    The divergence is a mean over labels, and its gradient flows only through the predictions at m', as in Hinton et al. (arXiv
    1503.02531). Both share one pass through vision tower and query transformer, since the first m' of m visual tokens are those
    for m'. Steps with m = 1 and evaluation use the plain loss. The logs contain m' of the step and the divergence of its last
    batch as `num_visual_tokens_below` and `divergence`.

    Args:
        weight (`float`, *optional*, defaults to 1): weight of the term for m'. With 0, the loss is the plain one.
        temperature (`float`, *optional*, defaults to 1): temperature of both distributions in the divergence.
        args, kwargs: as for [`MQTLlavaTrainer`].

    Raises:
        `ValueError`: if `weight` is negative or `temperature` is not positive.
    """

    def __init__(self, *args, weight: float = 1.0, temperature: float = 1.0, **kwargs):
        if not weight >= 0 or not temperature > 0:
            raise ValueError(
                f"Distillation needs a weight of 0 or more and a temperature above 0; got {weight} and {temperature}."
            )
        super().__init__(*args, **kwargs)
        self.weight, self.temperature = weight, temperature
        self.distillation_log: dict = {}
        self.distillation_sampler = self.sampler or VisualTokenSampler(
            self.data_collator.max_num_visual_tokens, self.model.config.num_query_tokens, self.args.seed
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # A copy: label smoothing removes the labels
        loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        step = self.state.global_step
        m = self.distillation_sampler.sample(step)
        if model.training and self.weight and m > 1:
            below = self.distillation_sampler.sample_below(step, m)
            small_inputs = self.with_fewer_tokens(below, inputs, outputs.image_outputs)
            small_loss, small_outputs = super().compute_loss(model, dict(small_inputs), True, num_items_in_batch)
            divergence, num_labels = divergence_at_labels(
                outputs.logits.detach(),
                inputs["labels"],
                small_outputs.logits,
                small_inputs["labels"],
                self.temperature,
            )
            self.distillation_log = {
                "num_visual_tokens_below": below,
                "divergence": (divergence.detach() / num_labels).item(),
            }
            # Labels are counted as in the cross-entropy of `Trainer`
            divergence = divergence / (num_labels if num_items_in_batch is None else num_items_in_batch)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                divergence = divergence * self.accelerator.num_processes
            loss = loss + self.weight * (small_loss + self.temperature**2 * divergence)
        return (loss, outputs) if return_outputs else loss

    def with_fewer_tokens(self, num_visual_tokens: int, inputs, image_outputs) -> dict:
        """The batch with the first m' visual tokens of each image, or all of them if it has fewer."""
        prompt = {name: value for name, value in inputs.items() if name != "pixel_values"}
        below = [min(count, num_visual_tokens) for count in prompt["visual_token_counts"].tolist()]
        return rebudget({**prompt, "mm_encoder_outputs": {"image": image_outputs}}, below, self.model.config)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= self.distillation_log
        super().log(logs, *args, **kwargs)


def divergence_at_labels(teacher_logits, teacher_labels, logits, labels, temperature=1.0):
    """
    Kullback-Leibler divergence between the predictions at two m. Their labels are the same, at different positions.

    Args:
        teacher_logits, logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Logits at each m, with its own sequence length.
        teacher_labels, labels (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Labels at each m; -100 is ignored.

    Returns:
        `tuple[torch.Tensor, int]`: the sum over labels of KL(teacher || student), of shape `()`, and their number.
    """
    teacher, student = (
        (logits[:, :-1][labels[:, 1:] != -100].float() / temperature).log_softmax(-1)
        for logits, labels in ((teacher_logits, teacher_labels), (logits, labels))
    )
    return F.kl_div(student, teacher, reduction="sum", log_target=True), len(student)
