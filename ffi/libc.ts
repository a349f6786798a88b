/**
 * The C library, through FFI: only what the kernel's interfaces need. It is opened on first use.
 *
 * @module
 */

import { SysError } from "./errno.ts";

/** Path or name of the C library; `HYPERTOPIA_LIBC` names another one. */
function libraryName(): string {
  return Deno.env.get("HYPERTOPIA_LIBC") ?? "libc.so.6";
}

/** Signatures (POSIX.1-2017 and glibc 2.36 headers). Variadic calls are given their fixed arguments, as x86-64 allows. */
export const LIBC_SYMBOLS = {
  /** `int *__errno_location(void)` */
  __errno_location: { parameters: [], result: "pointer" },
  /** `char *strerror(int errnum)` */
  strerror: { parameters: ["i32"], result: "pointer" },
  /** `int open(const char *path, int flags, mode_t mode)` */
  open: { parameters: ["buffer", "i32", "u32"], result: "i32" },
  /** `int close(int fd)` */
  close: { parameters: ["i32"], result: "i32" },
  /** `ssize_t read(int fd, void *buffer, size_t count)` */
  read: { parameters: ["i32", "pointer", "usize"], result: "isize" },
  /** `ssize_t write(int fd, const void *buffer, size_t count)` */
  write: { parameters: ["i32", "pointer", "usize"], result: "isize" },
  /** `ssize_t readv(int fd, const struct iovec *iov, int iovcnt)`: Linux moves less than 2 GiB, so the result is no bigint */
  readv: { parameters: ["i32", "buffer", "i32"], result: "i32" },
  /** `ssize_t writev(int fd, const struct iovec *iov, int iovcnt)`, likewise */
  writev: { parameters: ["i32", "buffer", "i32"], result: "i32" },
  /** `int socket(int domain, int type, int protocol)` */
  socket: { parameters: ["i32", "i32", "i32"], result: "i32" },
  /** `int bind(int fd, const struct sockaddr *address, socklen_t length)` */
  bind: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  /** `int listen(int fd, int backlog)` */
  listen: { parameters: ["i32", "i32"], result: "i32" },
  /** `int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)` */
  accept4: { parameters: ["i32", "pointer", "pointer", "i32"], result: "i32" },
  /** `int connect(int fd, const struct sockaddr *address, socklen_t length)` */
  connect: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  /** `int shutdown(int fd, int how)` */
  shutdown: { parameters: ["i32", "i32"], result: "i32" },
  /** `ssize_t send(int fd, const void *buffer, size_t length, int flags)`: as with readv, the result is no bigint */
  send: { parameters: ["i32", "buffer", "usize", "i32"], result: "i32" },
  /** `ssize_t recv(int fd, void *buffer, size_t length, int flags)`, likewise */
  recv: { parameters: ["i32", "buffer", "usize", "i32"], result: "i32" },
  /** `int ioctl(int fd, unsigned long request, unsigned long argument)` */
  ioctl: { parameters: ["i32", "u64", "u64"], result: "i32" },
  /** `int ioctl(int fd, unsigned long request, void *argument)` */
  ioctl_buffer: { name: "ioctl", parameters: ["i32", "u64", "buffer"], result: "i32" },
  /** `long syscall(SYS_ioctl, int fd, unsigned long request, void *argument)`: a result that may need more than 32 bits */
  ioctl_long: { name: "syscall", parameters: ["i64", "i32", "u64", "buffer"], result: "i64" },
  /** `void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)` */
  mmap: { parameters: ["usize", "usize", "i32", "i32", "i32", "i64"], result: "pointer" },
  /** `int munmap(void *address, size_t length)` */
  munmap: { parameters: ["pointer", "usize"], result: "i32" },
  /** `int mprotect(void *address, size_t length, int protection)` */
  mprotect: { parameters: ["pointer", "usize", "i32"], result: "i32" },
  /** `int madvise(void *address, size_t length, int advice)` */
  madvise: { parameters: ["pointer", "usize", "i32"], result: "i32" },
  /** `int memfd_create(const char *name, unsigned int flags)` */
  memfd_create: { parameters: ["buffer", "u32"], result: "i32" },
  /** `int ftruncate(int fd, off_t length)` */
  ftruncate: { parameters: ["i32", "i64"], result: "i32" },
  /** `int fallocate(int fd, int mode, off_t offset, off_t length)` */
  fallocate: { parameters: ["i32", "i32", "i64", "i64"], result: "i32" },
  /** The same, on a thread of the blocking pool. Its error number is lost. */
  fallocate_async: {
    name: "fallocate",
    parameters: ["i32", "i32", "i64", "i64"],
    result: "i32",
    nonblocking: true,
  },
  /** `off_t lseek(int fd, off_t offset, int whence)` */
  lseek: { parameters: ["i32", "i64", "i32"], result: "i64" },
  /** `int fcntl(int fd, int command, void *argument)` */
  fcntl_buffer: { name: "fcntl", parameters: ["i32", "i32", "buffer"], result: "i32" },
  /** `int statx(int dirfd, const char *path, int flags, unsigned int mask, struct statx *buffer)` */
  statx: { parameters: ["i32", "buffer", "i32", "u32", "buffer"], result: "i32" },
  /**
   * `ssize_t preadv2(int fd, const struct iovec *iov, int iovcnt, off_t offset, int flags)`: Linux moves less than 2 GiB,
   * so the result is no bigint
   */
  preadv2: { parameters: ["i32", "pointer", "i32", "i64", "i32"], result: "i32" },
  /** The same, on a thread of the blocking pool. Its error number is lost. */
  preadv2_async: {
    name: "preadv2",
    parameters: ["i32", "pointer", "i32", "i64", "i32"],
    result: "i32",
    nonblocking: true,
  },
  /** `ssize_t pwritev2(int fd, const struct iovec *iov, int iovcnt, off_t offset, int flags)`, likewise */
  pwritev2: { parameters: ["i32", "pointer", "i32", "i64", "i32"], result: "i32" },
  /** The same, on a thread of the blocking pool. Its error number is lost. */
  pwritev2_async: {
    name: "pwritev2",
    parameters: ["i32", "pointer", "i32", "i64", "i32"],
    result: "i32",
    nonblocking: true,
  },
  /** `int fdatasync(int fd)` */
  fdatasync: { parameters: ["i32"], result: "i32" },
  /** The same, on a thread of the blocking pool. Its error number is lost. */
  fdatasync_async: { name: "fdatasync", parameters: ["i32"], result: "i32", nonblocking: true },
  /** `int eventfd(unsigned int initial, int flags)` */
  eventfd: { parameters: ["u32", "i32"], result: "i32" },
  /** `int eventfd_read(int fd, eventfd_t *value)` */
  eventfd_read: { parameters: ["i32", "buffer"], result: "i32" },
  /** `int eventfd_write(int fd, eventfd_t value)` */
  eventfd_write: { parameters: ["i32", "u64"], result: "i32" },
  /** `int epoll_create1(int flags)` */
  epoll_create1: { parameters: ["i32"], result: "i32" },
  /** `int epoll_ctl(int epfd, int op, int fd, struct epoll_event *event)` */
  epoll_ctl: { parameters: ["i32", "i32", "i32", "buffer"], result: "i32" },
  /** `int epoll_wait(int epfd, struct epoll_event *events, int maxevents, int timeout)` */
  epoll_wait: { parameters: ["i32", "pointer", "i32", "i32"], result: "i32" },
  /** The same, on a thread of the blocking pool. Its error number is lost. */
  epoll_wait_async: {
    name: "epoll_wait",
    parameters: ["i32", "pointer", "i32", "i32"],
    result: "i32",
    nonblocking: true,
  },
  /** `pid_t setsid(void)` */
  setsid: { parameters: [], result: "i32" },
  /** `int poll(struct pollfd *fds, nfds_t count, int timeout)` */
  poll: { parameters: ["buffer", "u64", "i32"], result: "i32" },
  /** `int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg)` */
  pthread_create: { parameters: ["buffer", "pointer", "pointer", "pointer"], result: "i32" },
  /** `int pthread_join(pthread_t thread, void **result)` */
  pthread_join: { parameters: ["u64", "pointer"], result: "i32" },
  /** `int sigaction(int signum, const struct sigaction *act, struct sigaction *oldact)` */
  sigaction: { parameters: ["i32", "buffer", "pointer"], result: "i32" },
  /** `long syscall(SYS_tgkill, pid_t tgid, pid_t tid, int signal)` */
  tgkill: { name: "syscall", parameters: ["i64", "i32", "i32", "i32"], result: "i64" },
  /** `long syscall(SYS_seccomp, unsigned int operation, unsigned int flags, void *args)` */
  seccomp: { name: "syscall", parameters: ["i64", "u32", "u32", "u64"], result: "i64" },
  /** `long syscall(SYS_landlock_create_ruleset, const struct landlock_ruleset_attr *attr, size_t size, uint32_t flags)` */
  landlock_create_ruleset: { name: "syscall", parameters: ["i64", "buffer", "usize", "u32"], result: "i64" },
  /** `long syscall(SYS_landlock_add_rule, int ruleset_fd, enum landlock_rule_type, const void *attr, uint32_t flags)` */
  landlock_add_rule: { name: "syscall", parameters: ["i64", "i32", "u32", "buffer", "u32"], result: "i64" },
  /** `long syscall(SYS_futex, uint32_t *address, int op, uint32_t value, const struct timespec *, uint32_t *, uint32_t)` */
  futex: {
    name: "syscall",
    parameters: ["i64", "pointer", "i32", "u32", "pointer", "pointer", "u32"],
    result: "i64",
  },
} as const satisfies Deno.ForeignLibraryInterface;

/** The functions of the C library. */
export type Libc = Deno.DynamicLibrary<typeof LIBC_SYMBOLS>["symbols"];

let library: Libc | undefined;
let errnoView: Int32Array | undefined;

/**
 * Tells whether this is the system whose functions, numbers and structures are known here: Linux on x86-64.
 *
 * @returns Whether it is
 */
export function isKnownSystem(): boolean {
  return Deno.build.os === "linux" && Deno.build.arch === "x86_64";
}

/**
 * Opens the C library, once.
 *
 * @returns Its functions
 */
export function libc(): Libc {
  if (library) return library;
  const name = libraryName();
  try {
    library = Deno.dlopen(name, LIBC_SYMBOLS).symbols;
  } catch (cause) {
    throw new Error(
      `Cannot open the C library "${name}" as ${cause instanceof Error ? cause.message : cause}: ` +
        `run Deno with --allow-ffi on Linux with glibc, or name the library in HYPERTOPIA_LIBC`,
      { cause },
    );
  }
  return library;
}

/**
 * Reads the error number of the last failed call of this thread. Calls that are not blocking have none here.
 *
 * @returns The error number
 */
export function errno(): number {
  errnoView ??= new Int32Array(Deno.UnsafePointerView.getArrayBuffer(libc().__errno_location()!, 4));
  return errnoView[0]!;
}

/**
 * Throws if a call failed.
 *
 * @param result What the call returned
 * @param call The call, such as `ioctl(KVM_RUN)`
 * @returns The result as a number
 * @throws {SysError} If the result is negative
 */
export function check(result: number | bigint, call: string): number {
  const value = Number(result);
  if (value >= 0) return value;
  throw sysError(call, errno());
}

/**
 * Makes the error of a failed call.
 *
 * @param call The call
 * @param number The error number
 * @returns The error
 */
export function sysError(call: string, number: number): SysError {
  const text = libc().strerror(number);
  return new SysError(call, number, text === null ? "" : Deno.UnsafePointerView.getCString(text));
}

/**
 * Writes a text as C wants it.
 *
 * @param text The text, without NUL characters
 * @returns UTF-8 with a NUL at its end
 */
export function cString(text: string): Uint8Array<ArrayBuffer> {
  if (text.includes("\0")) {
    throw new TypeError(`Cannot pass "${text}" to the C library as it has a NUL character`);
  }
  return new TextEncoder().encode(`${text}\0`);
}
