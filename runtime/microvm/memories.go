package microvm

import (
	"errors"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// memoriesKept is how many memories wait for machines to be made of them. Those
// that machines use need no place here: the kernel keeps them.
const memoriesKept = 4

// memories keeps sealed memories at hand, the ones used last.
type memories struct {
	mu   sync.Mutex
	list []memory // most recently used last
}

// memory is a sealed memfd, made of page files.
type memory struct {
	key  string
	file *os.File
}

func newMemories() *memories { return new(memories) }

// memoryKey names what page files make together.
func memoryKey(files []pageFile) string {
	var key strings.Builder
	for _, f := range files {
		key.WriteString(f.Digest + " ")
	}
	return key.String()
}

// get returns a sealed memory of size bytes made of page files in dir, each upon
// the ones before. It is the caller's to close. A page file that is not what its
// digest says is an error that wraps errDamaged.
func (c *memories) get(dir string, files []pageFile, size int64) (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := memoryKey(files)
	i := slices.IndexFunc(c.list, func(m memory) bool { return m.key == key })
	if i < 0 {
		file, err := compose(dir, files, size)
		if err != nil {
			return nil, err
		}
		c.keep(memory{key, file})
		return duplicate(file)
	}
	m := c.list[i]
	c.list = append(slices.Delete(c.list, i, i+1), m)
	return duplicate(m.file)
}

// has reports whether a memory of the page files is at hand.
func (c *memories) has(files []pageFile) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := memoryKey(files)
	return slices.ContainsFunc(c.list, func(m memory) bool { return m.key == key })
}

// add keeps a memory that was made already. It owns file from then on.
func (c *memories) add(files []pageFile, file *os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(memory{memoryKey(files), file})
}

// keep adds a memory and drops the one that was not used for longest. mu is held.
func (c *memories) keep(m memory) {
	c.list = append(c.list, m)
	if len(c.list) > memoriesKept {
		c.list[0].file.Close()
		c.list = slices.Delete(c.list, 0, 1)
	}
}

func (c *memories) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.list {
		m.file.Close()
	}
	c.list = nil
}

// compose makes and seals a memory.
func compose(dir string, files []pageFile, size int64) (*os.File, error) {
	file, err := vmm.NewMemory(size)
	if err != nil {
		return nil, err
	}
	for _, p := range files {
		err = p.readPages(dir, size, func(buf []byte, first uint32) error {
			_, err := file.WriteAt(buf, int64(first)*vmm.PageSize)
			return err
		})
		if err != nil {
			return nil, errors.Join(err, file.Close())
		}
	}
	if err := vmm.Seal(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// duplicate returns another descriptor of the same file.
func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
