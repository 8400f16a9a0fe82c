// Loaded first into a process (LD_PRELOAD), this answers CPUID and XGETBV as another x86-64 CPU and system would. Instructions
// run as they do here: it shows what a program chooses, and that what it then runs is legal here. __init__.py says what it is
// given:
//
//   X86_CPU       leaf 1 ECX, leaf 7 EBX, leaf 7 EDX, leaf 7 subleaf 1 EAX, and XCR0, in hexadecimal; XCR0 counts where bit 27 of
//                 the first, OSXSAVE, is set
//   X86_NO_TILES  anything: the system refuses arch_prctl(ARCH_REQ_XCOMP_PERM), AMX's permission, as a sandbox may
//
// Linux can make CPUID fault (arch_prctl(ARCH_SET_CPUID), on CPUs that can). XGETBV cannot fault: it is found near a CPUID, where
// who asks the one asks the other, and an illegal instruction of the same length put in its place.
#include <cpuid.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kSetCpuid = 0x1012, kRequestPermission = 0x1023 };  // ARCH_SET_CPUID, ARCH_REQ_XCOMP_PERM

static const uint8_t kCpuid[2] = {0x0f, 0xa2}, kXgetbv[3] = {0x0f, 0x01, 0xd0}, kIllegal[3] = {0x0f, 0x0b, 0x90};  // ud2, nop
static constexpr uintptr_t kPage = 4096;
static unsigned leaf1_ecx, leaf7_ebx, leaf7_edx, leaf7_1_eax;
static unsigned long xcr0;

// Those that begin in the page at `page`, where it is mapped.
static void replace_xgetbv(uintptr_t page) {
  const bool next = mprotect((void*)page, 2 * kPage, PROT_READ | PROT_WRITE | PROT_EXEC) == 0;
  if (!next && mprotect((void*)page, kPage, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) return;
  uint8_t* const end = (uint8_t*)page + kPage + (next ? sizeof kXgetbv - 1 : 0);
  for (uint8_t* code = (uint8_t*)page; code + sizeof kXgetbv <= end; ++code)
    if (memcmp(code, kXgetbv, sizeof kXgetbv) == 0) memcpy(code, kIllegal, sizeof kIllegal);
}

// The instruction faults again under the default action, which ends the process as it would have.
static void not_ours(int signal_number) { signal(signal_number, SIG_DFL); }

static void on_cpuid(int signal_number, siginfo_t*, void* context) {
  greg_t* r = ((ucontext_t*)context)->uc_mcontext.gregs;
  if (memcmp((void*)r[REG_RIP], kCpuid, sizeof kCpuid) != 0) return not_ours(signal_number);
  const unsigned leaf = (unsigned)r[REG_RAX], subleaf = (unsigned)r[REG_RCX];
  unsigned a, b, c, d;
  syscall(SYS_arch_prctl, kSetCpuid, 1);
  __cpuid_count(leaf, subleaf, a, b, c, d);
  syscall(SYS_arch_prctl, kSetCpuid, 0);
  if (leaf == 1) c = leaf1_ecx;
  if (leaf == 7 && subleaf == 0) a = 1, b = leaf7_ebx, d = leaf7_edx;
  if (leaf == 7 && subleaf == 1) a = leaf7_1_eax;
  const uintptr_t page = (uintptr_t)r[REG_RIP] & -kPage;
  for (int i = -1; i <= 1; ++i) replace_xgetbv(page + i * kPage);
  r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
  r[REG_RIP] += sizeof kCpuid;
}

static void on_illegal(int signal_number, siginfo_t*, void* context) {
  greg_t* r = ((ucontext_t*)context)->uc_mcontext.gregs;
  if (memcmp((void*)r[REG_RIP], kIllegal, sizeof kIllegal) != 0) return not_ours(signal_number);
  unsigned low = (unsigned)xcr0, high = (unsigned)(xcr0 >> 32);
  if ((unsigned)r[REG_RCX] != 0) __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"((unsigned)r[REG_RCX]));
  r[REG_RAX] = low, r[REG_RDX] = high;
  r[REG_RIP] += sizeof kIllegal;
}

static bool refused_tiles() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[0])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kRequestPermission, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {sizeof filter / sizeof filter[0], filter};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

static void handle(int signal_number, void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO;
  sigaction(signal_number, &action, nullptr);
}

__attribute__((constructor)) static void pretend() {
  if (getenv("X86_NO_TILES") != nullptr && !refused_tiles()) perror("X86_NO_TILES"), exit(3);
  const char* cpu = getenv("X86_CPU");
  if (cpu == nullptr) return;
  if (sscanf(cpu, "%x %x %x %x %lx", &leaf1_ecx, &leaf7_ebx, &leaf7_edx, &leaf7_1_eax, &xcr0) != 5)
    fprintf(stderr, "X86_CPU: five numbers wanted, got '%s'\n", cpu), exit(3);
  handle(SIGSEGV, on_cpuid);
  handle(SIGILL, on_illegal);
  if (syscall(SYS_arch_prctl, kSetCpuid, 0) != 0) perror("arch_prctl(ARCH_SET_CPUID)"), exit(3);
}
