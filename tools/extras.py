"""Prints the requirements of these extras of pyproject.toml, one a line: extras.py train test"""

import sys

from setuptools.config.pyprojecttoml import read_configuration

project = read_configuration("pyproject.toml", expand=False)["project"]
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
