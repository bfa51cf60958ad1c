"""Network intrusion data: NSL-KDD and UNSW-NB15, in their published files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from typing_extensions import override

from lit_purify.data.subset import Subset
from lit_purify.data.table import Lines, Table


def _words(text: str) -> list[str]:
    return text.split()


_NSL_LOGIN = _words("land logged_in root_shell su_attempted is_host_login is_guest_login")
_NSL_COUNTS = _words(
    "duration src_bytes dst_bytes wrong_fragment urgent hot num_failed_logins num_compromised num_root "
    "num_file_creations num_shells num_access_files count srv_count dst_host_count dst_host_srv_count"
)
_NSL_COLUMNS = _words(
    "duration protocol_type service flag src_bytes dst_bytes land wrong_fragment urgent hot num_failed_logins "
    "logged_in num_compromised root_shell su_attempted num_root num_file_creations num_shells num_access_files "
    "num_outbound_cmds is_host_login is_guest_login count srv_count serror_rate srv_serror_rate rerror_rate "
    "srv_rerror_rate same_srv_rate diff_srv_rate srv_diff_host_rate dst_host_count dst_host_srv_count "
    "dst_host_same_srv_rate dst_host_diff_srv_rate dst_host_same_src_port_rate dst_host_srv_diff_host_rate "
    "dst_host_serror_rate dst_host_srv_serror_rate dst_host_rerror_rate dst_host_srv_rerror_rate label difficulty"
)
_NSL_CATEGORIES = {
    "protocol_type": _words("icmp tcp udp"),
    "service": _words(
        "IRC X11 Z39_50 aol auth bgp courier csnet_ns ctf daytime discard domain domain_u echo eco_i ecr_i efs exec "
        "finger ftp ftp_data gopher harvest hostnames http http_2784 http_443 http_8001 imap4 iso_tsap klogin kshell "
        "ldap link login mtp name netbios_dgm netbios_ns netbios_ssn netstat nnsp nntp ntp_u other pm_dump pop_2 pop_3 "
        "printer private red_i remote_job rje shell smtp sql_net ssh sunrpc supdup systat telnet tftp_u tim_i time "
        "urh_i urp_i uucp uucp_path vmnet whois"
    ),
    "flag": _words("OTH REJ RSTO RSTOS0 RSTR S0 S1 S2 S3 SF SH"),
}
_NSL_RELATIONS = ["dst_host_same_srv_rate = dst_host_srv_count / dst_host_count"] + [
    f"{before}_rate + {after}_rate <= 1"
    for before, after in (
        ("serror", "rerror"),
        ("same_srv", "diff_srv"),
        ("dst_host_serror", "dst_host_rerror"),
        ("dst_host_same_srv", "dst_host_diff_srv"),
    )
]


class NSLKDD(Table):
    """NSL-KDD (Tavallaee et al., "A detailed analysis of the KDD CUP 99 data set", CISDA 2009): normal or attack.

    121 features: 37 numbers, then protocol_type (3), service (70) and flag (11). The column difficulty and the constant
    num_outbound_cmds are dropped, and su_attempted 2 is set to 0. A tenth of the training rows is the validation split.

    An attacker cannot change protocol, service, flag or login features. Counts, bytes and the duration are integers
    that can only increase; rates lie in [0, 1].

    Args:
        root: Folder of the files of the Canadian Institute for Cybersecurity, as ``.txt``, ``.txt.xz`` or ``.txt.gz``.
        train: Name of the training file: ``KDDTrain+_20Percent`` or ``KDDTrain+``.
        test: ``KDDTest+``, or its rows that at least one of 21 classifiers got wrong (``KDDTest-21``).
        constrained: See ``Table``, as for all further arguments.
    """

    # The files are hashed themselves.
    irrelevant = Table.irrelevant | {"root"}
    source = "NSL-KDD (Tavallaee et al., CISDA 2009) from unb.ca/cic/datasets/nsl.html"

    def __init__(
        self,
        root: str | Path,
        train: str = "KDDTrain+_20Percent",
        test: Literal["KDDTest+", "KDDTest-21"] = "KDDTest+",
        constrained: bool = True,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        batch_size: int = 256,
        num_workers: int = 0,
        subset: Subset | None = None,
        evaluate_on: str = "test",
        seed: int = 0,
        val_subset: Subset | None = None,
    ) -> None:
        self.hard, folder = test == "KDDTest-21", Path(root).expanduser()
        super().__init__(
            folder / f"{train}.txt",
            "label",
            folder / "KDDTest+.txt",
            normal="normal",
            columns=_NSL_COLUMNS,
            drop=["num_outbound_cmds", "difficulty"],
            categorical=_NSL_CATEGORIES,
            immutable=[*_NSL_CATEGORIES, *_NSL_LOGIN],
            increasing=_NSL_COUNTS,
            integer=[*_NSL_COUNTS, *_NSL_LOGIN],
            relations=_NSL_RELATIONS,
            constrained=constrained,
            val_fraction=val_fraction,
            split_seed=split_seed,
            batch_size=batch_size,
            num_workers=num_workers,
            subset=subset,
            evaluate_on=evaluate_on,
            seed=seed,
            val_subset=val_subset,
        )

    @property
    def name(self) -> str:  # type: ignore[override]  # as in the base
        """Name of the dataset in reports."""
        return f"NSLKDD({'Test-21' if self.hard else 'KDDTest+'}{'' if self.constrained else ', unconstrained'})"

    @override
    def read(self, path: Path) -> tuple[list[str], Lines]:
        names, lines = super().read(path)
        attempted, difficulty = names.index("su_attempted"), names.index("difficulty")
        for line in lines.values():
            if len(line) == len(names) and line[attempted] == "2":
                line[attempted] = "0"
        if self.hard and path == self.test:
            lines = {number: line for number, line in lines.items() if line[difficulty:] != ["21"]}
        return names, lines


class UNSWNB15(Table):
    """UNSW-NB15 (Moustafa and Slay, MilCIS 2015), the partition in two CSV files: normal or attack.

    An attacker cannot change protocol, service, state or address features. Packets and bytes are integers that can only
    increase. A tenth of the training rows is the validation split.

    Args:
        root: Folder of ``UNSW_NB15_training-set.csv`` and ``UNSW_NB15_testing-set.csv``, or packed as ``.xz``.
        constrained: See ``Table``, as for all further arguments.
    """

    # The files are hashed themselves.
    irrelevant = Table.irrelevant | {"root"}
    source = "UNSW-NB15 (Moustafa and Slay, MilCIS 2015) from research.unsw.edu.au/projects/unsw-nb15-dataset"

    def __init__(
        self,
        root: str | Path,
        constrained: bool = True,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        batch_size: int = 256,
        num_workers: int = 0,
        subset: Subset | None = None,
        evaluate_on: str = "test",
        seed: int = 0,
        val_subset: Subset | None = None,
    ) -> None:
        folder = Path(root).expanduser()
        packets = _words("spkts dpkts sbytes dbytes sloss dloss")
        super().__init__(
            folder / "UNSW_NB15_training-set.csv",
            "attack_cat",
            folder / "UNSW_NB15_testing-set.csv",
            normal="Normal",
            drop=["id", "label"],
            # The test rows have states that the training rows lack.
            categorical={"proto": [], "service": [], "state": _words("ACC CLO CON ECO FIN INT PAR REQ RST URN no")},
            immutable=_words("proto service state swin dwin stcpb dtcpb is_ftp_login is_sm_ips_ports"),
            increasing=["dur", *packets],
            integer=packets,
            relations=["tcprtt = synack + ackdat"],
            constrained=constrained,
            val_fraction=val_fraction,
            split_seed=split_seed,
            batch_size=batch_size,
            num_workers=num_workers,
            subset=subset,
            evaluate_on=evaluate_on,
            seed=seed,
            val_subset=val_subset,
        )
