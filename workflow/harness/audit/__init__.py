"""What did somebody's training script really train? For any model, any optimizer and any switching of layers.

    from harness.audit import Audit

    with Audit(model, optimizer):
        train(...)

prints, when the block ends, which decoder layers were switched on, got gradients and moved, how the optimizer's state
grew, and what is wrong. In a `transformers.Trainer`: `callbacks=[AuditCallback()]`, after the callback that switches.
"""

from harness.audit.facts import Facts
from harness.audit.judging import Finding, judge
from harness.audit.observing import Audit, AuditCallback

__all__ = ["Audit", "AuditCallback", "Facts", "Finding", "judge"]
