"""Audits the record of a training run and prints every number as one line of JSON: ``python -m probescore_audit RUN``.

A trainer runs this in a process of its own (``LiveAudit``). What cannot be audited is one line on standard error, and the exit code 2.
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    """Audits the record of the training run whose folder is the only argument; returns the exit code."""
    if len(sys.argv) != 2:
        sys.stderr.write("give the folder of a run's record, and nothing else\n")
        return 2
    try:
        from probescore_audit.record import read_record
        from probescore_audit.record_audit import audit_record
        from probescore_audit.report import numbers_of

        found = numbers_of(audit_record(read_record(sys.argv[1], texts=False)))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except ImportError as error:
        sys.stderr.write(f"{error}: pip install 'probescore[audit]'\n")
        return 2
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
