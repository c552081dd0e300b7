"""All studies of the library, by name: programs beyond a mask and a score."""

from __future__ import annotations

from library import output_studies, select_studies, term_studies, weight_studies
from library.study import Study

__all__ = ["STUDIES", "Study"]

STUDIES: dict[str, Study] = {
    **weight_studies.STUDIES,
    **output_studies.STUDIES,
    **term_studies.STUDIES,
    **select_studies.STUDIES,
}
