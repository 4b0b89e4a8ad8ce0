"""The papers' tables: as data (`tables`), running them again (`running`), and comparing orders."""

from regkit.papers.comparing import compare, interval, orders
from regkit.papers.tables import TABLES, Row, Table

__all__ = ["TABLES", "Row", "Table", "compare", "interval", "orders"]
