"""The intermediate representation of OpenVINO: its graph, and the reader."""
