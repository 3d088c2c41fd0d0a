package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/atoll-run/atoll/image/fulldisk"
	"github.com/atoll-run/atoll/sandbox"
)

// ImportOptions says what to make of an archive.
type ImportOptions struct {
	Name     string // the image's name; may be empty when the archive brings names
	Config   Config // of a plain root file system; other archives bring their own
	Platform string // chosen from an OCI layout with several; default: this host's
}

// maxDocument bounds the JSON documents of an archive or registry, in bytes.
const maxDocument = 8 << 20

// ImportFile imports from a path: a tar archive as for Import, or a directory
// that holds an OCI layout.
func (s *Store) ImportFile(ctx context.Context, file string, opts ImportOptions) (Image, error) {
	const op = "image.Import"
	info, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) {
		return Image{}, sandbox.E(op, sandbox.NotFound, file, err)
	}
	if err != nil {
		return Image{}, fail(op, file, err)
	}
	if info.IsDir() {
		root, err := os.OpenRoot(file)
		if err != nil {
			return Image{}, fail(op, file, err)
		}
		defer root.Close()
		i, err := s.importBundle(ctx, dirBundle{root}, opts)
		if err != nil {
			return Image{}, fail(op, file, badArchive(file, err))
		}
		return i, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return Image{}, fail(op, file, err)
	}
	defer f.Close()
	return s.Import(ctx, f, opts)
}

// Import makes an image from a tar archive: one that "docker save" wrote, an OCI
// layout, or a plain root file system; or from a disk image, raw or qcow2. Each of
// them may be plain or compressed by gzip, zstd, xz or bzip2. A malformed one fails
// with Invalid and leaves nothing behind.
func (s *Store) Import(ctx context.Context, r io.Reader, opts ImportOptions) (Image, error) {
	const op = "image.Import"
	f, err := s.plain(ctx, r)
	if err != nil {
		return Image{}, fail(op, opts.Name, badArchive(opts.Name, err))
	}
	defer f.discard()
	if fulldisk.Recognize(f) {
		i, err := s.importDisk(f, opts)
		if err != nil {
			return Image{}, fail(op, opts.Name, err)
		}
		return i, nil
	}
	bundle, err := indexBundle(f.File)
	if err != nil {
		return Image{}, fail(op, opts.Name, badArchive(opts.Name, err))
	}
	if bundle != nil {
		i, err := s.importBundle(ctx, bundle, opts)
		if err != nil {
			return Image{}, fail(op, opts.Name, badArchive(opts.Name, err))
		}
		return i, nil
	}
	if opts.Name == "" {
		return Image{}, sandbox.Errorf(op, sandbox.Invalid, "", "the archive is a plain root file system and needs a name")
	}
	image := Image{Config: opts.Config.clone(), Created: time.Now().UTC(), Platform: HostPlatform(), Source: "imported root file system"}
	if opts.Platform != "" {
		image.Platform = opts.Platform
	}
	return s.fromLayers(ctx, op, image, []*os.File{f.File}, true, opts.Name)
}

// fromLayers converts layer files and records the result as image; given tells
// names that the caller gave from those that the archive brought.
func (s *Store) fromLayers(ctx context.Context, op string, image Image, layers []*os.File, given bool, names ...string) (Image, error) {
	err := s.convert(ctx, conversion{layers: layers, workdir: image.Config.WorkingDir}, func(root sandbox.Root, size int64) error {
		image.Root, image.Size = root, size
		var err error
		image, err = s.takeNames(op, image, names, given)
		return err
	})
	if err != nil {
		return Image{}, fail(op, strings.Join(names, ","), err)
	}
	return image, nil
}

// Extend makes a root of another with an OCI layer, plain or compressed, laid over it; the files that every sandbox writes anew
// for itself are left out. record must note who uses the root before it returns, since a concurrent Prune may find it unused.
func (s *Store) Extend(ctx context.Context, base sandbox.Root, layer io.Reader, record func(sandbox.Root) error) error {
	const op = "image.Extend"
	f, err := s.plain(ctx, layer)
	if err != nil {
		return fail(op, base.Digest, err)
	}
	defer f.discard()
	err = s.convert(ctx, conversion{base: &base, layers: []*os.File{f.File}, ignore: hostFiles}, func(root sandbox.Root, _ int64) error { return record(root) })
	if err != nil {
		return fail(op, base.Digest, err)
	}
	return nil
}

// plain copies r to an unfinished file of the store, decompressed.
func (s *Store) plain(ctx context.Context, r io.Reader) (*temp, error) {
	d, err := decompress(contextReader{ctx, r})
	if err != nil {
		return nil, fmt.Errorf("compressed archive: %w", err)
	}
	defer d.Close()
	f, err := s.temp()
	if err != nil {
		return nil, err
	}
	// The limit is on contents; headers of at most a few blocks come on top.
	limits := s.opts.Limits.withDefaults()
	limit := limits.Bytes + 2048*int64(limits.Entries)
	n, err := io.CopyBuffer(struct{ io.Writer }{&holeWriter{file: f.File}}, io.LimitReader(d, limit+1), make([]byte, 1<<20))
	if err == nil {
		err = f.Truncate(n) // a hole at the end
	}
	if err == nil && n > limit {
		err = fmt.Errorf("the archive unfolds to more than %d bytes", limit)
	}
	if err != nil {
		f.discard()
		return nil, err
	}
	return f, nil
}

// bundle is the files of an archive of images.
type bundle interface {
	// open returns a file's contents, which the caller closes.
	open(name string) (io.ReadCloser, error)
}

// dirBundle is an OCI layout in a directory; os.Root keeps links from leaving it.
type dirBundle struct{ root *os.Root }

func (d dirBundle) open(name string) (io.ReadCloser, error) {
	f, err := d.root.Open(filepath.FromSlash(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the layout has no file %q", name)
	}
	return f, err
}

// tarBundle is the same in a tar archive, indexed.
type tarBundle map[string]*io.SectionReader

func (t tarBundle) open(name string) (io.ReadCloser, error) {
	section := t[path.Clean(name)]
	if section == nil {
		return nil, fmt.Errorf("the archive has no file %q", name)
	}
	if _, err := section.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return io.NopCloser(section), nil
}

// maxBundle is how many files an archive of images may hold.
const maxBundle = 100_000

// indexBundle finds the files of an archive of images; nil, with no error, when
// it is none. It decides by what is at the top, so that a root file system with
// a file manifest.json is still one.
func indexBundle(f *os.File) (bundle, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	section := io.NewSectionReader(f, 0, info.Size())
	tr := tar.NewReader(section)
	files := tarBundle{}
	links := map[string]string{} // docker save makes equal layers links of each other
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("neither a readable tar archive nor the image of a disk that boots: %w", err)
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			if len(files) >= maxBundle {
				return nil, nil // no archive of images is that big
			}
			off, err := section.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			files[name] = io.NewSectionReader(f, off, h.Size)
		case tar.TypeSymlink:
			links[name] = path.Join(path.Dir(name), h.Linkname)
		case tar.TypeLink:
			links[name] = path.Clean(h.Linkname)
		}
		if name == "bin" || name == "etc" || name == "usr" {
			return nil, nil
		}
	}
	for name, target := range links {
		if files[name] == nil && files[target] != nil {
			files[name] = files[target]
		}
	}
	if files["manifest.json"] == nil && files["index.json"] == nil {
		return nil, nil
	}
	return files, nil
}

// dockerManifest is an element of manifest.json in what "docker save" writes.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// importBundle imports the only image of a bundle, or the one that opts choose.
func (s *Store) importBundle(ctx context.Context, b bundle, opts ImportOptions) (Image, error) {
	var docker []dockerManifest
	if err := readDocument(b, "manifest.json", &docker); err != nil {
		return s.importLayout(ctx, b, opts)
	}
	if len(docker) != 1 {
		return Image{}, fmt.Errorf("the archive holds %d images instead of one", len(docker))
	}
	names := docker[0].RepoTags
	if opts.Name != "" {
		names = []string{opts.Name}
	}
	var config v1.ConfigFile
	if err := readDocument(b, docker[0].Config, &config); err != nil {
		return Image{}, err
	}
	if len(config.RootFS.DiffIDs) != len(docker[0].Layers) {
		return Image{}, fmt.Errorf("the archive has %d layers, its configuration %d", len(docker[0].Layers), len(config.RootFS.DiffIDs))
	}
	return s.importLayers(ctx, b, docker[0].Layers, &config, "imported archive", opts.Name != "", names)
}

// importLayers copies layers out of a bundle, checks them against the
// configuration and converts them.
func (s *Store) importLayers(ctx context.Context, b bundle, layers []string, config *v1.ConfigFile, source string, given bool, names []string) (Image, error) {
	if len(names) == 0 {
		return Image{}, errors.New("the archive names no image, so a name must be given")
	}
	var files []*os.File
	for n, name := range layers {
		f, err := s.importLayer(ctx, b, name, config.RootFS.DiffIDs[n])
		if err != nil {
			return Image{}, err
		}
		defer f.discard()
		files = append(files, f.File)
	}
	image := fromOCI(config)
	image.Source = source
	return s.fromLayers(ctx, "image.Import", image, files, given, names...)
}

// importLayer returns one layer in its plain form, verified.
func (s *Store) importLayer(ctx context.Context, b bundle, name string, want v1.Hash) (*temp, error) {
	r, err := b.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	hash := sha256.New()
	d, err := decompress(r)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", name, err)
	}
	defer d.Close()
	f, err := s.plain(ctx, io.TeeReader(d, hash))
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", name, err)
	}
	if got := fmt.Sprintf("%x", hash.Sum(nil)); want.Algorithm != "sha256" || got != want.Hex {
		f.discard()
		return nil, fmt.Errorf("layer %s is corrupt: it should be %s and is sha256:%s", name, want, got)
	}
	return f, nil
}

// readDocument decodes a JSON file of a bundle.
func readDocument(b bundle, name string, into any) error {
	r, err := b.open(name)
	if err != nil {
		return err
	}
	defer r.Close()
	return decodeDocument(r, name, into)
}

func decodeDocument(r io.Reader, name string, into any) error {
	text, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return err
	}
	if len(text) > maxDocument {
		return fmt.Errorf("%s is larger than %d bytes", name, maxDocument)
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// fromOCI takes over what an OCI configuration says.
func fromOCI(c *v1.ConfigFile) Image {
	i := Image{
		Platform: c.OS + "/" + c.Architecture,
		Created:  c.Created.Time.UTC(),
		Config: Config{
			Env:        c.Config.Env,
			User:       c.Config.User,
			WorkingDir: c.Config.WorkingDir,
			Entrypoint: c.Config.Entrypoint,
			Cmd:        c.Config.Cmd,
			Labels:     c.Config.Labels,
			Shell:      c.Config.Shell,
		},
	}
	if c.Variant != "" {
		i.Platform += "/" + c.Variant
	}
	for port := range c.Config.ExposedPorts {
		i.Config.ExposedPorts = append(i.Config.ExposedPorts, port)
	}
	slices.Sort(i.Config.ExposedPorts)
	return i
}
