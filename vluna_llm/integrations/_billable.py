"""Tools of agents that are sold by themselves, in frameworks that name their tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..manual import OperationContext
    from ..vluna import Vluna


def _one(result: Any) -> int:
    return 1


@dataclass(frozen=True, slots=True)
class BillableTool:
    """A tool that costs money.

    Attributes:
        feature_code: what is sold.
        estimate: about how much, in the feature's unit.
        quantity: what a result comes to (LangChain: ``ToolMessage`` or ``Command``); 0 charges nothing.
        feature_family_code: its family.
    """

    feature_code: str
    estimate: int = 1
    quantity: Callable[[Any], int] = _one
    feature_family_code: str | None = None

    def operation(self, vluna: Vluna) -> OperationContext:
        """The gate's part of one use.

        Raises:
            ConfigurationError: the gate would refuse the code, or the estimate.
        """
        return vluna.operation(
            feature_code=self.feature_code, estimate=self.estimate, feature_family_code=self.feature_family_code
        )


def billable(tools: Mapping[str, str | BillableTool] | None, vluna: Vluna) -> dict[str, BillableTool]:
    """What is sold, by the tool's name; a feature code alone sells each use once.

    Raises:
        ConfigurationError: the gate would refuse one of them.
    """
    sold = {name: BillableTool(found) if isinstance(found, str) else found for name, found in (tools or {}).items()}
    for tool in sold.values():
        tool.operation(vluna)
    return sold
