/**
 * Errors of system calls.
 *
 * @module
 */

/**
 * Names of error numbers on Linux (Linux 6.1 `include/uapi/asm-generic/errno-base.h` and `errno.h`, the same on x86-64
 * and arm64).
 */
export const ERRNO_NAMES: Readonly<Record<number, string>> = {
  1: "EPERM",
  2: "ENOENT",
  3: "ESRCH",
  4: "EINTR",
  5: "EIO",
  6: "ENXIO",
  7: "E2BIG",
  8: "ENOEXEC",
  9: "EBADF",
  10: "ECHILD",
  11: "EAGAIN",
  12: "ENOMEM",
  13: "EACCES",
  14: "EFAULT",
  16: "EBUSY",
  17: "EEXIST",
  18: "EXDEV",
  19: "ENODEV",
  20: "ENOTDIR",
  21: "EISDIR",
  22: "EINVAL",
  23: "ENFILE",
  24: "EMFILE",
  25: "ENOTTY",
  26: "ETXTBSY",
  27: "EFBIG",
  28: "ENOSPC",
  29: "ESPIPE",
  30: "EROFS",
  31: "EMLINK",
  32: "EPIPE",
  33: "EDOM",
  34: "ERANGE",
  36: "ENAMETOOLONG",
  38: "ENOSYS",
  39: "ENOTEMPTY",
  62: "ETIME",
  71: "EPROTO",
  75: "EOVERFLOW",
  95: "EOPNOTSUPP",
  98: "EADDRINUSE",
  99: "EADDRNOTAVAIL",
  104: "ECONNRESET",
  107: "ENOTCONN",
  110: "ETIMEDOUT",
  111: "ECONNREFUSED",
  115: "EINPROGRESS",
};

/** A system call failed. */
export class SysError extends Error {
  /** The call, such as `ioctl(KVM_RUN)`. */
  readonly call: string;
  /** The error number. */
  readonly errno: number;
  /** Its name, such as `EBADF`; the number where it has none here. */
  readonly code: string;

  /**
   * Explains a failed call.
   *
   * @param call The call
   * @param errno The error number
   * @param text The C library's words for it
   */
  constructor(call: string, errno: number, text: string) {
    const code = ERRNO_NAMES[errno] ?? String(errno);
    super(`${call} failed with ${code}${text === "" ? "" : ` (${text})`}`);
    this.name = "SysError";
    this.call = call;
    this.errno = errno;
    this.code = code;
  }
}
