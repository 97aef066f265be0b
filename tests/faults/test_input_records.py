"""Study folders that were damaged, invented, or written by another version of rsauto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report_records import study_records, write_study

from rsauto.errors import InputError
from rsauto.report.compare import comparison
from rsauto.report.importance import importance
from rsauto.report.page import csv_bytes, page, parquet_bytes, report_files
from rsauto.report.pareto import panels_of_costs
from rsauto.report.table import load_study
from rsauto.status import status_values
