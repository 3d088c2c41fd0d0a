package image

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/atoll-run/atoll/image/fulldisk"
	"github.com/atoll-run/atoll/sandbox"
)

// importDisk makes an image of a file with a disk. It is kept as it is: sandboxes
// have layers of their own upon it.
func (s *Store) importDisk(f *temp, opts ImportOptions) (Image, error) {
	const op = "image.Import"
	info, err := f.Stat()
	if err != nil {
		return Image{}, err
	}
	disk, err := fulldisk.Check(f, info.Size())
	if err != nil {
		return Image{}, err
	}
	if opts.Name == "" {
		return Image{}, sandbox.Errorf(op, sandbox.Invalid, "", "the file is a disk image and needs a name")
	}
	digest, err := hashFile(f.Name())
	if err != nil {
		return Image{}, err
	}
	img := Image{Disk: disk.Size, Created: time.Now().UTC(), Platform: HostPlatform(), Source: fmt.Sprintf("imported disk image (%s)", disk.Format)}
	if opts.Platform != "" {
		img.Platform = opts.Platform
	}
	err = s.publish(f, sandbox.Root{Kind: sandbox.RootDisk, Digest: digest}, info.Size(), func(root sandbox.Root, size int64) error {
		img.Root, img.Size = root, size
		img, err = s.takeNames(op, img, []string{opts.Name}, true)
		return err
	})
	return img, err
}

// holeWriter writes a file and leaves holes where only zeros are written, as most of a
// disk is.
type holeWriter struct {
	file *os.File
	at   int64
}

// hole is the size of the smallest hole, in bytes.
const hole = 64 << 10

// Write implements io.Writer.
func (s *holeWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		part := p[n:min(len(p), n+hole)]
		if len(bytes.TrimLeft(part, "\x00")) > 0 {
			if _, err := s.file.WriteAt(part, s.at); err != nil {
				return n, err
			}
		}
		n += len(part)
		s.at += int64(len(part))
	}
	return n, nil
}

var _ io.Writer = (*holeWriter)(nil)

// notFiles says that an image which is not one of files cannot be used so.
func notFiles(op string, i Image, what string) error {
	whose := "the host's own system"
	if i.Root.Kind == sandbox.RootDisk {
		whose = "a disk image"
	}
	return sandbox.Errorf(op, sandbox.Unsupported, i.Root.Digest, "%s cannot be %s", whose, what)
}
