package daemon

import (
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// A daemon that starts on a full disk must be able to work, or nobody could
// remove anything with it. So it keeps some space for that moment.
const (
	maxReserve = 16 << 20 // bytes
	minReserve = 1 << 20  // bytes; also the free space below which a disk counts as full
)

func (h Home) reserveFile() string { return h.path("reserve") }

// keepReserve sees to it that the home's disk has a reserve, or releases it when
// the disk is full. Doing without one is no error.
func (h Home) keepReserve(log *slog.Logger) {
	var st unix.Statfs_t
	if err := unix.Statfs(string(h), &st); err != nil {
		log.Warn("looking at the disk of the state directory", "error", err)
		return
	}
	free := int64(st.Bavail) * st.Bsize
	if free < minReserve {
		log.Warn("the disk of the state directory is full: remove sandboxes, snapshots or images", "dir", string(h))
		if err := os.Remove(h.reserveFile()); err != nil && !os.IsNotExist(err) {
			log.Warn("releasing the reserve", "error", err)
		}
		return
	}
	size := min(maxReserve, max(minReserve, int64(st.Blocks)*st.Bsize/64))
	if info, err := os.Stat(h.reserveFile()); err == nil && info.Size() == size || free < 4*size {
		return
	}
	f, err := os.OpenFile(h.reserveFile(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err == nil {
		err = unix.Fallocate(int(f.Fd()), 0, 0, size)
		_ = f.Close()
	}
	if err != nil { // some file systems cannot
		log.Debug("no reserve of disk space", "error", err)
		_ = os.Remove(h.reserveFile())
	}
}
