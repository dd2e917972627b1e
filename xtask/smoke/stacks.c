#define _GNU_SOURCE
// Prints which BPF programs of the machine run on a private stack of theirs, one a line: its name,
// then `private` or `kernel`. From the machine code that the kernel made of each.
#include <errno.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

// add %gs:this_cpu_off, %r9: what a program with a private stack begins with, and nothing else
// uses r9 (arch/x86/net/bpf_jit_comp.c, `emit_priv_frame_ptr`). The offset follows.
static const uint8_t PRIVATE[] = {0x65, 0x4c, 0x03, 0x0c, 0x25};

static long bpf(int command, union bpf_attr *attr) {
    return syscall(SYS_bpf, command, attr, sizeof *attr);
}

static long information(int program, struct bpf_prog_info *info) {
    union bpf_attr attr = {0};
    attr.info.bpf_fd = program;
    attr.info.info_len = sizeof *info;
    attr.info.info = (uint64_t)info;
    return bpf(BPF_OBJ_GET_INFO_BY_FD, &attr);
}

static int print(uint32_t id) {
    union bpf_attr attr = {0};
    attr.prog_id = id;
    int program = bpf(BPF_PROG_GET_FD_BY_ID, &attr);
    if (program < 0 && errno == ENOENT) return 0; /* gone meanwhile */
    struct bpf_prog_info info = {0};
    if (program < 0 || information(program, &info)) {
        perror("stacks: program");
        return 1;
    }
    uint32_t bytes = info.jited_prog_len;
    uint8_t *code = malloc(bytes);
    struct bpf_prog_info with_code = {0};
    with_code.jited_prog_len = bytes;
    with_code.jited_prog_insns = (uint64_t)code;
    if (!bytes || !code || information(program, &with_code) || !with_code.jited_prog_insns) {
        fprintf(stderr, "stacks: no machine code of %.16s\n", info.name);
        return 1;
    }
    printf("%.16s %s\n", info.name, memmem(code, bytes, PRIVATE, sizeof PRIVATE) ? "private" : "kernel");
    free(code);
    close(program);
    return 0;
}

int main(void) {
    union bpf_attr attr = {0};
    while (bpf(BPF_PROG_GET_NEXT_ID, &attr) == 0) {
        uint32_t id = attr.next_id;
        if (print(id)) {
            return 1;
        }
        memset(&attr, 0, sizeof attr);
        attr.start_id = id;
    }
    return 0;
}
