"""Tools of agents that are sold by themselves: what one use of them is charged, whatever framework runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .manual import OperationContext, RecordedOperation
    from .vluna import Vluna

log = logging.getLogger("vluna_llm")


@dataclass(frozen=True, slots=True)
class BillableTool:
    """A tool that costs money.

    Attributes:
        feature_code: what is sold.
        estimate: about how much one use takes, in the feature's unit; charged where ``quantity`` is not given.
        quantity: what a result (LangChain: ``ToolMessage`` or ``Command``) comes to, or how much it comes to on each
            meter, by the meter's code; 0 charges nothing. Where it raises, or gives no quantity, that is told and the
            estimate is charged, labelled: the tool was used.
        feature_family_code: its family.
    """

    feature_code: str
    estimate: int = 1
    quantity: Callable[[Any], int | Mapping[str, int]] | None = None
    feature_family_code: str | None = None

    def operation(self, vluna: Vluna) -> OperationContext:
        """The gate's part of one use.

        Raises:
            ConfigurationError: the gate would refuse the code, or the estimate.
        """
        return vluna.operation(
            feature_code=self.feature_code, estimate=self.estimate, feature_family_code=self.feature_family_code
        )

    def used(self, op: RecordedOperation, result: Any) -> None:
        """Record what one use took."""
        if self.quantity is None:
            op.record(quantity=self.estimate)
            return
        try:
            taken = self.quantity(result)
            if isinstance(taken, Mapping):
                op.record(meters=taken)
            else:
                op.record(quantity=taken)
        except Exception as error:
            log.error("quantity= of the tool sold as %s failed: %s", self.feature_code, type(error).__name__)
            op.record_estimate(self.estimate)


def billable(tools: Mapping[str, str | BillableTool] | None, vluna: Vluna) -> dict[str, BillableTool]:
    """What is sold, by the tool's name; a feature code alone sells each use once.

    Raises:
        ConfigurationError: the gate would refuse one of them.
    """
    sold = {name: BillableTool(found) if isinstance(found, str) else found for name, found in (tools or {}).items()}
    for tool in sold.values():
        tool.operation(vluna)
    return sold
