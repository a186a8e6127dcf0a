"""The active checks that come with the package; registered in pyproject.toml, as everybody's are."""
