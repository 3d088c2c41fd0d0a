package microvmtest

import (
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

//go:embed cloudimage.sh
var cloudImageScript []byte

// cloudImage makes the image unless an earlier run of tests has left it. Several
// processes may want it at once.
var cloudImage = sync.OnceValues(func() (string, error) {
	user, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(user, "atoll-test", "cloudimage")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	path := filepath.Join(dir, fmt.Sprintf("%x.raw", sha256.Sum256(cloudImageScript))[:20]+".raw")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	cmd := exec.Command("sh", "-c", string(cloudImageScript), "cloudimage.sh", path)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make a cloud image: %w: %s", err, out[max(0, len(out)-2000):])
	}
	return path, nil
})

// CloudImage returns the path of a raw disk image with a boot loader, Debian and
// cloud-init. It is kept from one run of tests to the next, and made of packages in a
// minute or two. Where mmdebstrap is not installed, the test is skipped.
func CloudImage(tb testing.TB) string {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root: mmdebstrap makes device nodes")
	}
	if _, err := exec.LookPath("mmdebstrap"); errors.Is(err, exec.ErrNotFound) {
		tb.Skip("needs mmdebstrap, which scripts/deps installs, to make a cloud image")
	}
	path, err := cloudImage()
	if err != nil {
		tb.Fatal(err)
	}
	return path
}
