"""The flag --mesh of the programs that split a model over devices."""

from absl import flags

flags.disclaim_key_flags()  # --help shows it among those of the program that defines it


class SizesParser(flags.ArgumentParser):
    """Text "D,F,T" -> (data, fsdp, tensor); ValueError for anything else."""

    syntactic_help = "three whole numbers with commas between"

    def parse(self, argument: str) -> tuple[int, int, int]:
        try:
            data, fsdp, tensor = map(int, argument.split(","))
        except ValueError as error:
            raise ValueError("give three whole numbers, the sizes of data,fsdp,tensor, such as 1,1,4") from error
        return data, fsdp, tensor

    def flag_type(self) -> str:
        return "data,fsdp,tensor"


def define_mesh_flag(what: str = "the device mesh") -> flags.FlagHolder:
    """Defines --mesh: sizes for `sharding.make_mesh`, or None for the first device alone."""
    text = f"sizes data,fsdp,tensor of {what}; default: the first device"
    return flags.DEFINE(SizesParser(), "mesh", None, text, serializer=flags.CsvListSerializer(","))
