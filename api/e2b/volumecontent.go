package e2b

import (
	"crypto/subtle"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// Who owns what clients put into volumes unless they say otherwise: the user of
// the base template.
const (
	volumeUID = 1000
	volumeGID = 1000
)

const (
	maxVolumeFile  = 64 << 30 // bytes of one upload
	maxVolumeDepth = 32       // levels of one listing
	maxVolumeList  = 100_000  // entries of one listing
)

// volumeEntry is a file, directory or link in a volume.
type volumeEntry struct {
	Name   string    `json:"name"`
	Path   string    `json:"path"`
	Type   string    `json:"type"` // file, directory, symlink or unknown
	Size   int64     `json:"size"`
	Mode   uint32    `json:"mode"` // permission bits
	UID    uint32    `json:"uid"`
	GID    uint32    `json:"gid"`
	Atime  time.Time `json:"atime"`
	Mtime  time.Time `json:"mtime"`
	Ctime  time.Time `json:"ctime"`
	Target string    `json:"target,omitempty"` // of a link
}

// inVolume opens the volume that the path names for clients that carry its
// token. Sandboxes write into volumes as they like, also links to anywhere:
// everything goes through os.Root, which never leaves the directory.
func (a *api) inVolume(next func(w http.ResponseWriter, r *http.Request, root *os.Root, name string) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := a.node.GetVolume(r.Context(), "", r.PathValue("id"))
		// An unknown volume and a wrong token look the same to a stranger.
		if err != nil || v.ID != r.PathValue("id") || subtle.ConstantTimeCompare([]byte(presentedKey(r)), []byte(v.Token)) != 1 {
			writeJSON(w, http.StatusUnauthorized, contentError{"401", "the token is not for this volume"})
			return
		}
		root, err := os.OpenRoot(a.node.VolumePath(v))
		if err != nil {
			a.contentFailed(w, r, "/", err)
			return
		}
		defer root.Close()
		name := cleanPath(r.URL.Query().Get("path"))
		r.Body = &meteredBody{ReadCloser: r.Body, node: a.node, volume: v, room: max(0, a.node.VolumeRoom(v))}
		if err := next(w, r, root, name); err != nil {
			a.contentFailed(w, r, "/"+strings.TrimPrefix(name, "."), err)
		}
	}
}

// meteredBody is what is written into a volume. It fails with EDQUOT before it
// exceeds the volume's room.
type meteredBody struct {
	io.ReadCloser
	node   *node.Node
	volume node.Volume
	room   int64 // bytes
}

// Read implements io.Reader.
func (b *meteredBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.room -= int64(n); b.room < 0 {
		return 0, syscall.EDQUOT
	}
	b.node.VolumeGrew(b.volume, int64(n))
	return n, err
}

// cleanPath turns a client's path, absolute or not, into one relative to the
// volume; ".." cannot leave it.
func cleanPath(p string) string {
	p = strings.TrimPrefix(path.Clean("/"+p), "/")
	if p == "" {
		return "."
	}
	return p
}

// contentError is the body of a failed call; here the code is a string.
type contentError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (a *api) contentFailed(w http.ResponseWriter, r *http.Request, name string, err error) {
	if rec := recordOf(r.Context()); rec != nil {
		rec.err = err
	}
	status, message := http.StatusInternalServerError, "internal error"
	var big *http.MaxBytesError
	switch {
	case errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, io.ErrUnexpectedEOF):
		status, message = http.StatusBadRequest, "path "+name+" cannot be used: "+cause(err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), leaves(err):
		status, message = http.StatusNotFound, "path "+name+" not found"
	case errors.Is(err, fs.ErrExist), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.ENXIO):
		status, message = http.StatusConflict, "path "+name+" already exists"
	case errors.Is(err, fs.ErrPermission):
		status, message = http.StatusForbidden, "path "+name+" cannot be changed"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		status, message = http.StatusInsufficientStorage, "there is not enough space in the volume"
	case errors.As(err, &big):
		status, message = http.StatusRequestEntityTooLarge, "the file is too large"
	case sandbox.Is(err, sandbox.Invalid):
		status, message = http.StatusBadRequest, messageOf(err)
	}
	writeJSON(w, status, contentError{strconv.Itoa(status), message})
}

// leaves reports whether a path leads out of the volume by a link, which is as
// good as nowhere. os.Root has no name for this error.
func leaves(err error) bool {
	var p *fs.PathError
	return errors.As(err, &p) && strings.Contains(p.Err.Error(), "escapes")
}

// cause is the innermost reason, without paths of the host.
func cause(err error) string {
	for next := errors.Unwrap(err); next != nil; next = errors.Unwrap(err) {
		err = next
	}
	return err.Error()
}

func (a *api) statPath(w http.ResponseWriter, _ *http.Request, root *os.Root, name string) error {
	return answerEntry(w, http.StatusOK, root, name)
}

func answerEntry(w http.ResponseWriter, status int, root *os.Root, name string) error {
	e, err := entryAt(root, name)
	if err != nil {
		return err
	}
	writeJSON(w, status, e)
	return nil
}

// entryAt describes what is at name, a link itself and not what it points to.
func entryAt(root *os.Root, name string) (volumeEntry, error) {
	info, err := root.Lstat(name)
	if err != nil {
		return volumeEntry{}, err
	}
	e := volumeEntry{Name: path.Base("/" + name), Path: "/" + name, Type: "unknown", Size: info.Size(), Mode: uint32(info.Mode().Perm()), Mtime: info.ModTime().UTC()}
	if name == "." {
		e.Path = "/"
	}
	switch {
	case info.Mode().IsRegular():
		e.Type = "file"
	case info.IsDir():
		e.Type = "directory"
	case info.Mode()&fs.ModeSymlink != 0:
		e.Type = "symlink"
		if e.Target, err = root.Readlink(name); err != nil {
			return e, err
		}
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		e.UID, e.GID = st.Uid, st.Gid
		e.Atime = time.Unix(st.Atim.Unix()).UTC()
		e.Ctime = time.Unix(st.Ctim.Unix()).UTC()
	}
	return e, nil
}

// listDir lists a directory, down to a depth; one level unless asked for more.
func (a *api) listDir(w http.ResponseWriter, r *http.Request, root *os.Root, name string) error {
	depth := 1
	if s := r.URL.Query().Get("depth"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > maxVolumeDepth {
			return invalid("depth must be between 1 and %d", maxVolumeDepth)
		}
		depth = n
	}
	out := []volumeEntry{}
	var walk func(dir string, left int) error
	walk = func(dir string, left int) error {
		entries, err := readDir(root, dir)
		if err != nil {
			return err
		}
		for _, d := range entries {
			if len(out) == maxVolumeList {
				return invalid("the directory has more than %d entries", maxVolumeList)
			}
			at := path.Join(dir, d.Name())
			e, err := entryAt(root, at)
			if errors.Is(err, fs.ErrNotExist) {
				continue // removed meanwhile
			}
			if err != nil {
				return err
			}
			out = append(out, e)
			if e.Type == "directory" && left > 1 {
				if err := walk(at, left-1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := walk(name, depth); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, out)
	return nil
}

// readDir lists a directory, sorted by name. What is none is not opened: a pipe
// would hold us until somebody writes to it.
func readDir(root *os.Root, name string) ([]fs.DirEntry, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, err
}

// attributes are what a client may set of an entry; nil leaves it.
type attributes struct {
	UID  *uint32 `json:"uid"`
	GID  *uint32 `json:"gid"`
	Mode *uint32 `json:"mode"`
}

func parseAttributes(r *http.Request) (attributes, error) {
	var at attributes
	q := r.URL.Query()
	for name, p := range map[string]**uint32{"uid": &at.UID, "gid": &at.GID, "mode": &at.Mode} {
		s := q.Get(name)
		if s == "" {
			continue
		}
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return at, invalid("%s must be a number", name)
		}
		v := uint32(n)
		*p = &v
	}
	return at, nil
}

// apply sets what is given, and owners of what is new.
func (at attributes) apply(root *os.Root, name string, fresh bool) error {
	if fresh {
		at.UID, at.GID = new32(valueOr(at.UID, volumeUID)), new32(valueOr(at.GID, volumeGID))
	}
	if at.UID != nil || at.GID != nil {
		e, err := entryAt(root, name)
		if err != nil {
			return err
		}
		if err := root.Lchown(name, int(valueOr(at.UID, e.UID)), int(valueOr(at.GID, e.GID))); err != nil {
			return err
		}
	}
	if at.Mode != nil {
		return root.Chmod(name, fs.FileMode(*at.Mode)&fs.ModePerm)
	}
	return nil
}

func new32(v uint32) *uint32 { return &v }

func forced(r *http.Request) bool {
	f, _ := strconv.ParseBool(r.URL.Query().Get("force"))
	return f
}

// makeDir makes a directory; with force also its parents, and one that exists
// is no error.
func (a *api) makeDir(w http.ResponseWriter, r *http.Request, root *os.Root, name string) error {
	at, err := parseAttributes(r)
	if err != nil {
		return err
	}
	force := forced(r)
	if force {
		if e, err := entryAt(root, name); err == nil && e.Type == "directory" {
			return answerEntry(w, http.StatusCreated, root, name)
		}
		for dir := range parents(name) {
			if err := root.Mkdir(dir, 0o755); errors.Is(err, fs.ErrExist) {
				continue
			} else if err != nil {
				return err
			}
			if err := (attributes{}).apply(root, dir, true); err != nil {
				return err
			}
		}
	}
	if err := root.Mkdir(name, 0o755); err != nil {
		return err
	}
	if err := at.apply(root, name, true); err != nil {
		return err
	}
	return answerEntry(w, http.StatusCreated, root, name)
}

// parents yields the directories above name, the outermost first.
func parents(name string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for i, c := range name {
			if c == '/' && !yield(name[:i]) {
				return
			}
		}
	}
}

func (a *api) changePath(w http.ResponseWriter, r *http.Request, root *os.Root, name string) error {
	var at attributes
	if !a.decode(w, r, &at) {
		return nil
	}
	if _, err := root.Lstat(name); err != nil {
		return err
	}
	if err := at.apply(root, name, false); err != nil {
		return err
	}
	return answerEntry(w, http.StatusOK, root, name)
}

// removePath removes what is at name with all below it.
func (a *api) removePath(w http.ResponseWriter, _ *http.Request, root *os.Root, name string) error {
	if _, err := root.Lstat(name); err != nil {
		return err
	}
	if name == "." {
		return fs.ErrPermission
	}
	if err := root.RemoveAll(name); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *api) readFile(w http.ResponseWriter, r *http.Request, root *os.Root, name string) error {
	// A pipe that nobody writes to would otherwise hold the open for ever.
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fs.ErrNotExist
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", info.ModTime(), f)
	return nil
}

// writeFile writes a whole file. It appears at once and complete, or not at all.
func (a *api) writeFile(w http.ResponseWriter, r *http.Request, root *os.Root, name string) error {
	at, err := parseAttributes(r)
	if err != nil {
		return err
	}
	if e, err := entryAt(root, name); err == nil && (e.Type != "file" || !forced(r)) {
		return fs.ErrExist
	}
	part := path.Join(path.Dir(name), ".upload-"+sandbox.NewID())
	f, err := root.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, http.MaxBytesReader(w, r.Body, maxVolumeFile))
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = at.apply(root, part, true)
	}
	if err == nil {
		err = root.Rename(part, name)
	}
	if err != nil {
		_ = root.Remove(part)
		return err
	}
	return answerEntry(w, http.StatusCreated, root, name)
}
