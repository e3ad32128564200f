"""Training on the text itself: the next token's cross-entropy, without a teacher."""

from actors.data import TokenBatch
from actors.recovery.distillation.student import Checkpointing, Student, Terms
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.cross_entropy import next_token_cross_entropy
from actors.recovery.losses.lm_head import LMHead
from actors.recovery.losses.token_weights import next_ids, prediction_weights


class CausalLM(Student):
    """Next-token prediction; nothing of a teacher is computed.

    Args:
        pair: its student is trained.
        gradient_checkpointing: see `Student`.
    """

    def __init__(self, pair: TeacherStudent, gradient_checkpointing: Checkpointing = False):
        super().__init__(pair, gradient_checkpointing)
        self._head = LMHead(pair.student)

    def forward(self, batch: TokenBatch) -> Terms:
        """Return `causal_lm`, in nats, and the same as `loss`."""
        loss = next_token_cross_entropy(
            self.hidden(batch), next_ids(batch), self._head, prediction_weights(batch)
        )
        return {"causal_lm": loss, "loss": loss}
