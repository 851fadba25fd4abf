"""What a check of an image found, in the words of `qemu-img check`."""

from dataclasses import dataclass, field

#: Texts kept; counting goes on.
MAX_MESSAGES = 1000


@dataclass(slots=True, kw_only=True)
class CheckResult:
    """Counts and messages; filled while the check walks the image.

    Attributes:
        filename: As the caller gave it.
        format: qcow or qcow2.
        image_end_offset: Where the last cluster in use ends, in bytes.
        total_clusters: Clusters of the virtual disk.
        allocated_clusters: Those that have a place in the file.
        fragmented_clusters: Those that do not follow their predecessor.
        compressed_clusters: Those stored compressed.
        corruptions: Contradictions that can cost data.
        leaks: Clusters counted as used that nothing uses.
        check_errors: What could not be checked.
        messages: One line for each finding, at most `MAX_MESSAGES`.
    """

    filename: str
    format: str
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    messages: list[str] = field(default_factory=list)

    def corruption(self, message: str, times: int = 1) -> None:
        """Count a contradiction, `times` if several pointers lead to it."""
        self.corruptions += times
        self._keep(f"ERROR {message}")

    def leak(self, message: str) -> None:
        """Count a leaked cluster."""
        self.leaks += 1
        self._keep(f"Leaked {message}")

    def check_error(self, message: str) -> None:
        """Count something that could not be checked."""
        self.check_errors += 1
        self._keep(f"ERROR {message}")

    def _keep(self, message: str) -> None:
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)

    def as_json(self) -> dict[str, int | str]:
        """Return the fields that `qemu-img check --output=json` prints; most zeros are left out."""
        counts = {
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
        }
        shown: dict[str, int | str] = {
            name: count for name, count in counts.items() if count
        }
        shown["check-errors"] = self.check_errors
        shown["filename"] = self.filename
        shown["format"] = self.format
        return shown

    def as_text(self) -> str:
        """Return the findings and a summary for people, ending in a newline."""
        lines = list(self.messages)
        hidden = self.corruptions + self.leaks + self.check_errors - len(lines)
        if hidden > 0:
            lines.append(f"... and {hidden} more")
        if self.corruptions:
            lines.append(f"{self.corruptions} errors were found on the image.")
        if self.leaks:
            lines.append(f"{self.leaks} leaked clusters were found on the image.")
        if self.check_errors:
            lines.append(f"{self.check_errors} internal errors have occurred.")
        if not (self.corruptions or self.leaks or self.check_errors):
            lines.append("No errors were found on the image.")
        if self.total_clusters and self.allocated_clusters:
            share = 100 / self.allocated_clusters
            lines.append(
                f"{self.allocated_clusters}/{self.total_clusters} ="
                f" {100 * self.allocated_clusters / self.total_clusters:.2f}% allocated,"
                f" {self.fragmented_clusters * share:.2f}% fragmented,"
                f" {self.compressed_clusters * share:.2f}% compressed clusters"
            )
        if self.image_end_offset:
            lines.append(f"Image end offset: {self.image_end_offset}")
        return "\n".join(lines) + "\n"
